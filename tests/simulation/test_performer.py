"""Behaviour of the performer that depends on a clock, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import pytest

from nomad_watchdog.controllers.agents.executor import FENCE_S, ActionExecutor
from nomad_watchdog.controllers.agents.workqueue import WorkQueue
from nomad_watchdog.core import planner
from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.core.goals import Goals
from nomad_watchdog.errors import TransientError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, Slug
from nomad_watchdog.model import Device, DeviceRecord, Limits
from tests.simulation.fakes import Cluster, FakeRegistry, FakeScheduler, Line, Store
from tests.simulation.simulator import SPEC
from tests.simulation.virtual_time import VirtualClock, VirtualLoop

T = TypeVar("T")


class SlowLine(Line):
    """Every start is answered after a while."""

    def __init__(self, takes_s: float) -> None:
        self.takes_s = takes_s

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if what == "scheduler.ensure":
            await asyncio.sleep(self.takes_s)
        return await super().call(what, effect)


async def start_two(first_takes_s: float) -> list[str]:
    """Start two devices with one slot; the outcomes in order."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    cluster.prepare([SPEC.agent_class])
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(concurrency=1), clock)
    done: list[str] = []
    executor = ActionExecutor(
        fleet,
        FakeScheduler(cluster, SlowLine(first_takes_s)),
        {SPEC.agent_class: SPEC},
        WorkQueue(clock),
        lambda _action, outcome, _took_s: done.append(outcome),
    )
    await fleet.records.register(
        [Device(DeviceId(name), SPEC.agent_class, "127.0.0.1") for name in "ab"]
    )
    hashes = {SPEC.agent_class: SPEC.spec_hash}
    actions: list[Action] = []
    for record in fleet.records.values():
        actions.extend(planner.decide(record, (), Goals(hashes)))
    await executor.perform(actions)
    assert len(cluster.jobs) == done.count("ok")
    return done


class DeadLine(Line):
    """One kind of call is never answered; counts them."""

    def __init__(self, dead: str) -> None:
        self.dead = dead
        self.calls = 0

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if what == self.dead:
            self.calls += 1
            await asyncio.sleep(0.1)
            raise TransientError("500")
        return await super().call(what, effect)


async def calls_into_a_storm(dead: str, devices: int, lasts_s: float) -> int:
    """Calls to a server that refuses all calls of this kind, while each device always wants a
    start."""
    store, cluster, line = Store(), Cluster(), DeadLine(dead)
    store.initialise("test")
    cluster.prepare([SPEC.agent_class])
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    queue: WorkQueue[Slug, Action] = WorkQueue(clock)
    hashes = {SPEC.agent_class: SPEC.spec_hash}

    def wish(slug: Slug) -> None:
        for action in planner.decide(fleet.records[slug], (), Goals(hashes)):
            queue.put(slug, action)

    executor = ActionExecutor(
        fleet,
        FakeScheduler(cluster, line),
        {SPEC.agent_class: SPEC},
        queue,
        lambda action, _outcome, _took_s: wish(action.slug),
    )
    names = [DeviceId(f"cam {number}") for number in range(devices)]
    await fleet.records.register([Device(name, SPEC.agent_class, "127.0.0.1") for name in names])
    fleet.records.registry = FakeRegistry(store, line)
    for slug in fleet.records:
        wish(slug)
    with suppress(TimeoutError):
        async with asyncio.timeout(lasts_s):
            await executor.run()
    return line.calls


@pytest.mark.parametrize("dead", ["scheduler.ensure", "registry.commit"])
def test_s9_calls_into_a_storm_do_not_grow_with_the_fleet(dead: str) -> None:
    """While a scheduler or a registry refuses everything for ten minutes, it receives less than
    twice as many calls for 500 devices as for 20."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        few = runner.run(calls_into_a_storm(dead, 20, 600.0))
        many = runner.run(calls_into_a_storm(dead, 500, 600.0))
    assert 20 < few < 300
    assert many < 2 * few


def run(first_takes_s: float) -> list[str]:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(start_two(first_takes_s))


def test_s2_a_fence_is_good_for_a_while_only() -> None:
    """A start that waited longer than FENCE_S for a slot is dropped; one that waited less is
    carried out."""
    assert run(FENCE_S + 1) == ["ok", "fenced"]
    assert run(FENCE_S - 1) == ["ok", "ok"]


async def starts_before(urgent: bool) -> int:
    """In a storm of 600 devices, the number of starts between one more device's request and its
    start."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    cluster.prepare([SPEC.agent_class])
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(concurrency=4), clock)
    queue: WorkQueue[Slug, Action] = WorkQueue(clock)
    done: list[Slug] = []
    executor = ActionExecutor(
        fleet,
        FakeScheduler(cluster, SlowLine(0.01)),
        {SPEC.agent_class: SPEC},
        queue,
        lambda action, _outcome, _took_s: done.append(action.slug),
    )
    names = [DeviceId(f"cam {number}") for number in range(601)]
    await fleet.records.register([Device(name, SPEC.agent_class, "127.0.0.1") for name in names])
    *storm, single = fleet.records.values()

    def wish(record: DeviceRecord, *, urgent: bool) -> None:
        for action in planner.decide(record, (), Goals({SPEC.agent_class: SPEC.spec_hash})):
            queue.put(record.slug, action, urgent=urgent)

    for record in storm:
        wish(record, urgent=False)
    task = asyncio.ensure_future(executor.run())
    await asyncio.sleep(1.0)
    before = len(done)
    wish(single, urgent=urgent)
    while single.slug not in done:
        await asyncio.sleep(0.01)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return done.index(single.slug) - before


def test_l4_an_urgent_start_passes_what_was_fenced_before_it() -> None:
    """In a storm it waits for starts in progress and for its own fence, but not for the batches in
    hand."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(starts_before(urgent=True)) <= 16
        assert runner.run(starts_before(urgent=False)) > 100


async def started_without_record(kind: ActionKind) -> tuple[list[str], int]:
    """The outcomes of an action whose record is in the registry but not in our memory, and the
    number of jobs afterwards."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    cluster.prepare([SPEC.agent_class])
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    done: list[str] = []
    executor = ActionExecutor(
        fleet,
        FakeScheduler(cluster),
        {SPEC.agent_class: SPEC},
        WorkQueue(clock),
        lambda _action, outcome, _took_s: done.append(outcome),
    )
    await fleet.records.register([Device(DeviceId("pump"), SPEC.agent_class, "127.0.0.1")])
    (record,) = fleet.records.values()
    (action,) = planner.decide(record, (), Goals({SPEC.agent_class: SPEC.spec_hash}))
    fleet.records.reset({}, fleet.records.reached)
    await executor.perform([replace(action, kind=kind)])
    return done, len(cluster.jobs)


@pytest.mark.parametrize("kind", [ActionKind.START, ActionKind.REPLACE])
def test_s1_nothing_is_started_without_its_record(kind: ActionKind) -> None:
    """Without the record it is unknown whether its first epoch is above the floor: the action is
    dropped."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(started_without_record(kind)) == (["fenced"], 0)
