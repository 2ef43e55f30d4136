"""When all placements are read, and when the scheduler's answer that nothing has changed is
enough."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.controllers.agents.placement_informer import PlacementInformer
from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers import Snapshot
from tests.core.world import record
from tests.simulation.cluster import Cluster
from tests.simulation.fakes import FakeScheduler

SPEC = AgentSpec("default", "1", "h")


class Counted(FakeScheduler):
    """Counts full reads, and answers that a read is not needed."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.reads = self.asked = 0
        self.fourth = asyncio.Event()

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        self.reads += only is None
        if self.reads == 4:
            self.fourth.set()
        return await super().snapshot(only)

    async def unchanged_since(self, snapshot: Snapshot) -> bool:
        self.asked += 1
        return await super().unchanged_since(snapshot)


def looking(scheduler: FakeScheduler) -> tuple[PlacementInformer, list[Snapshot]]:
    taken: list[Snapshot] = []
    informer = PlacementInformer(
        scheduler, SystemClock(), 0.02, Metrics(), taken.append, lambda _reason: None
    )
    return informer, taken


async def test_a_quiet_scheduler_is_read_now_and_then() -> None:
    """On the timer the last snapshot is reused while the scheduler reports no change; every tenth
    check reads anyway."""
    scheduler = Counted(Cluster())
    informer, taken = looking(scheduler)
    task = asyncio.ensure_future(informer.run())
    try:
        async with asyncio.timeout(20):
            await scheduler.fourth.wait()
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert len(taken) >= 3 + 18
    assert scheduler.asked >= 18


async def test_what_has_changed_is_read_on_the_timer() -> None:
    """A change without a hint is found by the next read."""
    cluster = Cluster()
    scheduler, other = Counted(cluster), FakeScheduler(cluster)
    informer, taken = looking(scheduler)
    await other.prepare([SPEC])
    await informer.read()
    device = record("quiet")
    await other.ensure(device, Epoch(1), SPEC)
    await informer.read(thrifty=True)
    assert device.slug in taken[-1].placements
    assert scheduler.reads == 2
    await informer.read(thrifty=True)
    assert (scheduler.reads, len(taken)) == (2, 3)
    assert taken[-1] is taken[-2]


async def test_a_second_read_is_one() -> None:
    """A read that confirms a doubt is always a full read (S7)."""
    scheduler = Counted(Cluster())
    informer, _ = looking(scheduler)
    for _ in range(3):
        await informer.read()
    assert (scheduler.reads, scheduler.asked) == (3, 0)


async def test_a_scheduler_that_does_not_answer_is_no_quiet_one() -> None:
    """If even the cheap check fails, the read fails."""
    cluster = Cluster()
    informer, taken = looking(Counted(cluster))
    await informer.read()
    cluster.broken = True
    with pytest.raises(TransientError):
        await informer.read(thrifty=True)
    assert len(taken) == 1


async def test_a_backend_that_can_not_tell_is_read_each_time() -> None:
    """A backend without `unchanged_since` is read every time."""

    class Plain:
        """Only the required methods."""

        def __init__(self) -> None:
            self.inner = Counted(Cluster())
            self.snapshot, self.watch = self.inner.snapshot, self.inner.watch

    plain = Plain()
    informer, _ = looking(plain)  # type: ignore[arg-type]
    for _ in range(3):
        await informer.read(thrifty=True)
    assert (plain.inner.reads, plain.inner.asked) == (3, 0)
