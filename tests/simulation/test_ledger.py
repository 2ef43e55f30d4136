"""Behaviour of the ledger that depends on a clock, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Device, Limits
from tests.simulation.fakes import FakeRegistry, Line, Store
from tests.simulation.virtual_time import VirtualClock, VirtualLoop

T = TypeVar("T")
LATE = DeviceId("late")


class SlowAnswers(Line):
    """A full read happens at once and is answered a second later."""

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        answer = await super().call(what, effect)
        if what == "registry.read":
            await asyncio.sleep(1.0)
        return answer


async def overtaken() -> tuple[Fleet, Store]:
    """During a read another replica registers a device and our watch reports it."""
    store = Store()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store, SlowAnswers()), Limits(), clock)
    other = Fleet(FakeRegistry(store), Limits(), clock)
    await other.records.register([Device(DeviceId("first"), "default", "127.0.0.1")])
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(fleet.records.reread())
        await asyncio.sleep(0.5)
        await other.records.register([Device(LATE, "default", "127.0.0.1")])
        news = await FakeRegistry(store).read()
        fleet.records.reset(news.records, news.index)
    answer = reading.result()
    if answer is not None:
        fleet.records.reset(answer.records, answer.index)
    return fleet, store


async def restored() -> tuple[Fleet, Store]:
    """The store is replaced by an older copy of itself, then read."""
    fleet, store = await overtaken()
    first = store.rows.pop(slug_of(LATE))
    store.index = first[0] - 1
    answer = await fleet.records.reread()
    assert answer is not None
    fleet.records.reset(answer.records, answer.index)
    return fleet, store


async def put_back_before_our_write() -> tuple[Fleet, Store]:
    """Our last write is lost with the store, from which we had seen nothing since the write before
    it."""
    store = Store()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    await fleet.records.register([Device(DeviceId("first"), "default", "127.0.0.1")])
    seen = await FakeRegistry(store).read()
    fleet.records.reset(seen.records, seen.index)
    await fleet.records.register([Device(LATE, "default", "127.0.0.1")])
    store.rows.pop(slug_of(LATE))
    store.index = seen.index
    fleet.records.reset(seen.records, seen.index)  # as a late watch would report it
    assert slug_of(LATE) in fleet.records
    assert fleet.records.index < fleet.records.reached
    answer = await fleet.records.reread()
    assert answer is not None
    fleet.records.reset(answer.records, answer.index)
    return fleet, store


def test_s8_an_answer_that_was_overtaken_takes_nothing_back() -> None:
    """A device that the watch reported stays known when the answer of an older full read arrives
    later."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        fleet, store = runner.run(overtaken())
    assert slug_of(LATE) in fleet.records
    assert fleet.records.index == store.index


def test_a_restored_store_is_believed() -> None:
    """An index lower than the one known when the read began is accepted as the store's state."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        fleet, store = runner.run(restored())
    assert slug_of(LATE) not in fleet.records
    assert fleet.records.index == store.index


def test_a_store_put_back_to_before_our_own_write_is_believed() -> None:
    """A late watch undoes no write of ours; a read begun after our write does."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        fleet, store = runner.run(put_back_before_our_write())
    assert slug_of(LATE) not in fleet.records
    assert fleet.records.index == fleet.records.reached == store.index
