"""Deleting a tombstone never lets an epoch be used again: every interleaving of the real code."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.controllers.agents.executor import ActionExecutor
from nomad_watchdog.controllers.agents.fence import Fence
from nomad_watchdog.controllers.agents.workqueue import WorkQueue
from nomad_watchdog.core import planner, tombstones
from nomad_watchdog.core.goals import Goals
from nomad_watchdog.core.placement_gc import TOMBSTONE_REST_S, PlacementGc
from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.fleet import records
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.records import RecordCache
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Device, DeviceRecord, Epoch, Limits, Monotonic, Presence, WallTime
from nomad_watchdog.registry import epoch_floor
from nomad_watchdog.registry.codec import encode
from nomad_watchdog.registry.epoch_floor import FLOOR, floor_of
from tests.registry.records import record
from tests.simulation.fakes import Cluster, FakeRegistry, FakeScheduler, Line, Store
from tests.simulation.simulator import SPEC
from tests.simulation.virtual_time import VirtualClock

T = TypeVar("T")
PUMP = Device(DeviceId("pump"), SPEC.agent_class, "127.0.0.1")
SLUG = slug_of(PUMP.id)
GOALS = Goals({SPEC.agent_class: SPEC.spec_hash})
MAX_SCHEDULES = 5_000


class Turns(Line):
    """Calls to the registry wait until the schedule lets one of them through."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        await turn
        return effect()


class BrokenError(Exception):
    """An epoch was assigned twice, or a lower one after a higher one."""


class World:
    """A registry with one tombstone, and replicas of the real code that use it."""

    def __init__(self, epoch: int, replicas: int) -> None:
        self.line, self.store = Turns(), Store()
        self.store.initialise("test")
        old = replace(record("pump", epoch=epoch), presence=Presence.ABSENT, instance="i-1")
        self.store.commit([(SLUG, 0, encode(replace(old, device=PUMP)))])
        self.peak = epoch
        self.store.on_write = self._written
        self.broken = ""
        clock = VirtualClock(asyncio.get_running_loop())
        self.fleets = [
            Fleet(FakeRegistry(self.store, self.line), Limits(), clock) for _ in range(replicas)
        ]
        for fleet in self.fleets:
            fleet.records.reset({SLUG: self.stored()}, self.store.index)
        self.performers = [
            ActionExecutor(
                fleet,
                FakeScheduler(Cluster(), self.line),
                {SPEC.agent_class: SPEC},
                WorkQueue(clock),
                lambda *_: None,
            )
            for fleet in self.fleets
        ]

    def stored(self) -> DeviceRecord:
        found = self.store.record(SLUG)
        assert found is not None
        return found

    def _written(self, before: DeviceRecord | None, after: DeviceRecord) -> None:
        was = before.epoch if before is not None else 0
        if after.epoch == was:
            return
        if after.epoch <= self.peak:
            self.broken = f"S2: epoch {after.epoch} is committed after {self.peak}"
        self.peak = max(self.peak, after.epoch)

    async def expire(self, at: int) -> None:
        """Replica `at` deletes the tombstone, as the timer of `PeriodicJobs` does."""
        fleet = self.fleets[at]
        ours = tombstones.expired(fleet.records.values(), (), WallTime(1e12), 3600.0, 9)
        await fleet.records.forget(ours)

    async def live(self, at: int, *, leave: bool = False) -> None:
        """Replica `at` registers the device, starts an agent, and deregisters the device if `leave` is set."""
        fleet, executor = self.fleets[at], self.performers[at]
        for _ in range(4):
            try:
                await fleet.records.register([PUMP])
                break
            except ConflictError:
                await self.read(at)
        for _ in range(4):
            known = fleet.records.get(SLUG)
            if known is None or known.presence is Presence.ABSENT or known.epoch > self.peak:
                break
            done = await Fence(executor.fleet, executor.leases).pass_all(
                list(planner.decide(known, (), GOALS))
            )
            if any(isinstance(one, DeviceRecord) for one in done):
                break
        if leave:
            try:
                await fleet.records.deregister([PUMP.id])
            except ConflictError:
                return

    async def read(self, at: int) -> None:
        """Replica `at` reads the registry again."""
        fleet = self.fleets[at]
        snapshot = await fleet.records.reread()
        if snapshot is not None:
            fleet.records.reset(snapshot.records, snapshot.index)

    async def play(
        self, work: Sequence[Awaitable[None]], choose: Callable[[int], int]
    ) -> list[int]:
        """Run all work concurrently; `choose` picks the next of the waiting calls. Return the number of waiting calls
        at each step."""
        tasks = [asyncio.ensure_future(one) for one in work]
        widths: list[int] = []
        while not all(task.done() for task in tasks):
            for _ in range(8):
                await asyncio.sleep(0)
            if not self.line.waiting:
                continue
            widths.append(len(self.line.waiting))
            self.line.waiting.pop(choose(widths[-1])).set_result(None)
        for task in tasks:
            task.result()
        if self.broken:
            raise BrokenError(self.broken)
        return widths


async def one(choices: Sequence[int]) -> list[int]:
    """One schedule of an expiry concurrent with a new life of the device; then, undisturbed, another life."""
    world, steps = World(7, 2), iter(choices)
    widths = await world.play([world.expire(0), world.live(1)], lambda _: next(steps, 0))
    # L1: undisturbed, the device gets an agent, at an epoch that no agent has carried.
    before = world.peak
    await world.play([world.read(1)], lambda _: 0)
    if world.stored().presence is Presence.ABSENT or world.stored().epoch <= 7:
        await world.play([world.live(1)], lambda _: 0)
        assert world.stored().epoch > before
    assert world.stored().presence is Presence.PRESENT
    return widths


def every_schedule() -> int:
    """Run all schedules, depth first; return their number."""
    prefix: list[int] = []
    for number in range(1, MAX_SCHEDULES):
        widths = asyncio.run(one(prefix))
        taken = prefix + [0] * (len(widths) - len(prefix))
        while taken and taken[-1] + 1 >= widths[len(taken) - 1]:
            taken.pop()
        if not taken:
            return number
        prefix = [*taken[:-1], taken[-1] + 1]
    raise AssertionError("more schedules than expected")


def test_s2_no_interleaving_brings_an_epoch_back() -> None:
    """In whatever order the calls of an expiry and of a new registration reach the registry, the first agent of the new
    record has a higher epoch than any before (S2), and it gets one (L1)."""
    assert every_schedule() > 10


async def _forget_first(self: RecordCache, gone: Sequence[DeviceRecord]) -> int:
    """Like `RecordCache.forget`, but the floor is raised after the deletion: the tombstone is deleted too early."""
    await self.registry.forget(gone)
    await epoch_floor.raise_floor(self.registry, EpochFloor().over(gone))
    return 0


async def _remembered(self: RecordCache) -> EpochFloor:
    """Like `RecordCache.read_floor`, but from memory."""
    return self.floor


async def _nothing(*_: Any) -> bool:
    return True


@pytest.mark.parametrize(
    ("of", "name", "bug"),
    [
        pytest.param(RecordCache, "forget", _forget_first, id="the tombstone is dropped too early"),
        pytest.param(RecordCache, "read_floor", _remembered, id="the floor is not read again"),
        pytest.param(records, "raise_floor", _nothing, id="no floor is kept"),
    ],
)
def test_s2_a_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, of: object, name: str, bug: object
) -> None:
    """The same search finds each way in which a deleted tombstone would let an epoch be used again."""
    monkeypatch.setattr(of, name, bug)
    with pytest.raises(BrokenError, match="S2"):
        every_schedule()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.lists(st.integers(0, 5), max_size=80))
def test_s2_three_replicas_and_several_lives(epoch: int, choices: list[int]) -> None:
    """Two replicas register and remove the device while the third deletes its tombstone, twice."""

    async def several() -> None:
        world, steps = World(epoch, 3), iter(choices)
        for _ in range(2):
            work = [world.expire(0), world.live(1, leave=True), world.live(2), world.read(0)]
            await world.play(work, lambda width: next(steps, 0) % width)
            await world.play([world.read(0), world.read(1)], lambda _: 0)

    asyncio.run(several())


def test_only_what_left_long_ago_and_is_listed_nowhere_may_go() -> None:
    """A tombstone stays for its retention time, and as long as the scheduler lists anything of the device."""
    gone = replace(record("a"), presence=Presence.ABSENT, changed_at=WallTime(100.0))
    here = record("b")

    def due(now: float, *listed: DeviceRecord, most: int = 9) -> list[DeviceRecord]:
        slugs = {one.slug for one in listed}
        return tombstones.expired([gone, here], slugs, WallTime(now), 50.0, most)

    assert due(149.0) == []
    assert due(150.0) == [gone]
    assert due(150.0, gone) == []
    assert due(1e9, here) == [gone]
    assert EpochFloor(Epoch(3), 9).over(
        [replace(gone, epoch=Epoch(5), generation=2)]
    ) == EpochFloor(Epoch(5), 9)


def test_s2_a_clock_that_is_set_deletes_nothing_at_once() -> None:
    """A tombstone that is due, possibly by a wall clock that was set forward, first rests by the monotonic clock, and
    one that has changed meanwhile rests again: a start may be in flight."""
    placement_gc, gone = PlacementGc(), replace(record("a"), presence=Presence.ABSENT, index=3)
    rest = TOMBSTONE_REST_S
    assert placement_gc.rested([gone], Monotonic(0.0)) == []
    assert placement_gc.rested([gone], Monotonic(rest - 1)) == []
    assert placement_gc.rested([gone], Monotonic(rest)) == [gone]
    assert placement_gc.rested([replace(gone, index=4)], Monotonic(rest + 1)) == []
    assert placement_gc.rested([gone], Monotonic(2 * rest)) == []


async def test_the_floor_outlives_its_writers() -> None:
    """The floor only increases, whichever replica raises it, and an unreadable document is an error, never 0."""
    store = Store()
    store.initialise("test")
    registry = FakeRegistry(store)
    assert await epoch_floor.raise_floor(registry, EpochFloor(Epoch(5), 2))
    assert await epoch_floor.raise_floor(registry, EpochFloor(Epoch(3), 4))
    assert floor_of(await registry.document(FLOOR)) == EpochFloor(Epoch(5), 4)
