"""What only a clock can show of the reconciler, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from nomad_watchdog.errors import TransientError
from nomad_watchdog.fleet import Fleet
from nomad_watchdog.follower import DOUBT_EVERY_S
from nomad_watchdog.ids import DeviceId, Shard, slug_of
from nomad_watchdog.leases import Term, Undivided
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Device, Limits, Monotonic, PlacementState
from nomad_watchdog.reconciler import Reconciler
from nomad_watchdog.testing.fakes import Cluster, FakeRegistry, FakeScheduler, Line, Store
from nomad_watchdog.testing.simulation import SPEC
from nomad_watchdog.testing.virtual_time import VirtualClock, VirtualLoop

T = TypeVar("T")
ONE = DeviceId("one")


class CutShort(Line):
    """While armed, each answer of the registry's watch leaves out every record."""

    armed = False

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        answer: Any = await super().call(what, effect)
        if what == "registry.watch" and self.armed:
            return (answer[0], [])  # type: ignore[return-value]  # a listing, as `what` says
        return answer  # type: ignore[no-any-return]


class Refusing(Line):
    """The scheduler starts nothing, so that no agent without a record makes anybody read it again."""

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if what == "scheduler.ensure":
            raise TransientError("no")
        return await super().call(what, effect)


class Slow(Line):
    """A full list of the scheduler is three seconds under way after it was made; counts the stops."""

    def __init__(self) -> None:
        super().__init__()
        self.stops = 0

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        self.stops += what == "scheduler.retire"
        answer = await super().call(what, effect)
        if what == "scheduler.snapshot":
            await asyncio.sleep(3.0)
        return answer


async def stopped_beside_a_list() -> tuple[int, bool]:
    """How often an agent was stopped whose stop was answered while a list was under way; whether it went."""
    store, cluster, line = Store(), Cluster(), Slow()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    reconciler = Reconciler(fleet, FakeScheduler(cluster, line), specs, Metrics())
    task = asyncio.ensure_future(reconciler.run())
    await fleet.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(30.0)
    assert fleet.placements[slug_of(ONE)]
    reconciler.informer.resync("test", now=True)
    await asyncio.sleep(1.0)
    await fleet.deregister([ONE])
    await asyncio.sleep(30.0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    found = fleet.placements.get(slug_of(ONE), ())
    return line.stops, all(one.state is PlacementState.DEAD for one in found)


def test_s5_an_agent_is_not_stopped_again_for_a_list_from_before() -> None:
    """A list that was begun before a stop was answered shows the agent running, and asks for no second stop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        stops, gone = runner.run(stopped_beside_a_list())
    assert stops == 1
    assert gone


class Overtaken(Line):
    """The first read of the registry is under way for two seconds, all others are not."""

    first = True

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        answer = await super().call(what, effect)
        if what == "registry.read" and self.first:
            self.first = False
            await asyncio.sleep(2.0)
        return answer


@dataclass
class Late(Undivided):
    """Holds its shard since a moment after the start."""

    since: Monotonic | None = None

    def terms(self) -> Mapping[Shard, Term]:
        return {} if self.since is None else {Shard(0): Term(1, self.since)}


async def lease_beside_a_read() -> bool:
    """Whether a device gets its agent when the lease came while the first read was under way."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store, Overtaken()), Limits(), clock)
    leases = Late()
    specs = {SPEC.agent_class: SPEC}
    reconciler = Reconciler(fleet, FakeScheduler(cluster), specs, Metrics(), leases)
    task = asyncio.ensure_future(reconciler.run())
    await asyncio.sleep(1.0)
    leases.since = clock.monotonic()
    leases.changed.set()
    await asyncio.sleep(5.0)
    await fleet.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(60.0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return bool(fleet.placements.get(slug_of(ONE)))


def test_l1_a_read_from_before_the_lease_that_ends_last_does_not_undo_the_one_after() -> None:
    """Two reads of the registry at once, the older one ending last: the shard is reconciled all the same."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(lease_beside_a_read())


async def cut_short() -> tuple[bool, bool]:
    """Whether the record was gone after a cut answer of the watch, and whether it is after a while."""
    store, cluster, line = Store(), Cluster(), CutShort()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store, line), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    task = asyncio.ensure_future(
        Reconciler(fleet, FakeScheduler(cluster, Refusing()), specs, Metrics()).run()
    )
    other = Fleet(FakeRegistry(store), Limits(), clock)
    await other.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(60.0)
    assert slug_of(ONE) in fleet.records
    line.armed = True
    await other.register([Device(DeviceId("two"), SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(0.5)
    lost = slug_of(ONE) not in fleet.records
    line.armed = False
    # Nobody writes any more, so that the watch has nothing to tell.
    await asyncio.sleep(2 * DOUBT_EVERY_S)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return lost, slug_of(ONE) in fleet.records


def test_s8_an_answer_that_was_cut_short_is_read_again() -> None:
    """Records that one answer left out are known again soon, though the store's index does not move."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        lost, known = runner.run(cut_short())
    assert lost
    assert known
