"""A scheduler backend of a third party, its entry point, and the conformance suite that checks it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from nomad_watchdog.errors import TransientError, UserError
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement, PlacementState
from nomad_watchdog.schedulers import Capabilities, Capacity, Hint, Scheduler, Snapshot
from nomad_watchdog.testing.conformance import CHECKS, Maker, Rig, check_scheduler, record_of


class MemoryScheduler:
    """Keeps placements in memory and runs nothing."""

    name = "memory"
    capabilities = Capabilities(restarts=False)

    def __init__(self, *, installation: str, shards: int) -> None:
        self.installation, self.shards = installation, shards
        self._placements: dict[Slug, Placement] = {}
        self._index = 0
        self._changed = asyncio.Event()

    async def prepare(
        self,
        specs: Collection[AgentSpec],
        *,
        shards: Collection[Shard] | None = None,
        trials: Collection[AgentSpec] = (),
    ) -> Mapping[str, str]:
        del shards, trials
        return {spec.agent_class: "has no template" for spec in specs if not spec.template}

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        if not spec.template:
            raise UserError("the template is empty")
        now = self._placements.get(record.slug)
        if now is not None and now.epoch == epoch:
            return self._index
        self._index += 1
        self._placements[record.slug] = Placement(
            slug=record.slug,
            device_id=record.device.id,
            epoch=epoch,
            agent_class=spec.agent_class,
            spec_hash=spec.spec_hash,
            state=PlacementState.RUNNING,
            ref=f"{record.slug}:{epoch}",
        )
        self._changed.set()
        return self._index

    async def retire(self, placement: Placement, grace_s: float) -> None:
        if grace_s < 0:
            raise TransientError("try again with a positive grace period", retry_after_s=1.0)
        self._placements[placement.slug] = replace(placement, state=PlacementState.DEAD)

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        found = {
            slug: (placement,)
            for slug, placement in self._placements.items()
            if only is None or slug in only
        }
        return Snapshot(found, self._index, only=None if only is None else frozenset(only))

    async def watch(self) -> AsyncIterator[Hint]:
        yield Hint(slugs=None)
        while True:
            await self._changed.wait()
            self._changed.clear()
            yield Hint(slugs=frozenset(self._placements), index=self._index, calm=True)

    async def capacity(self) -> Capacity:
        return Capacity.beside((), 10)

    async def sweep(self, dead: Collection[Placement]) -> int:
        return sum(self._placements.pop(one.slug, None) is not None for one in dead)

    async def close(self) -> None:
        self._placements.clear()


def entry_point(**settings: object) -> Scheduler:
    """What an entry point of the group `nomad_watchdog.schedulers` names is called with keyword arguments."""
    return MemoryScheduler(
        installation=str(settings["installation"]), shards=int(str(settings["shards"]))
    )


def rig() -> Rig:
    backend = MemoryScheduler(installation="test", shards=1)

    def spec(*, version: str = "1", **fields: str) -> AgentSpec:
        return AgentSpec("default", version, version, template="memory", variables=fields)

    async def processes(slug: Slug) -> set[int]:
        found = (await backend.snapshot([slug])).placements.get(slug, ())
        return {1 for one in found if one.state is PlacementState.RUNNING}

    return Rig(
        scheduler=lambda: backend,
        spec=spec,
        failing_spec=spec,
        scale_spec=spec,
        processes=processes,
        timeout_s=5.0,
    )


@asynccontextmanager
async def maker() -> AsyncIterator[Rig]:
    yield rig()


async def conformance() -> list[str]:
    make: Maker = maker
    assert "ensure_twice_is_one" in CHECKS
    return await check_scheduler(make, only=["ensure_twice_is_one"], hostile_ids=10)


async def use(scheduler: Scheduler) -> tuple[PlacementState, ...]:
    record = record_of("camera 7")
    spec = AgentSpec("default", "1", "abc", template="memory")
    unprepared = await scheduler.prepare([spec], shards=[Shard(0)])
    assert unprepared.get("default", "") == ""
    index: int = await scheduler.ensure(record, Epoch(1), spec)
    snapshot = await scheduler.snapshot([record.slug])
    assert snapshot.index >= index
    async for hint in scheduler.watch():
        if hint.slugs is None or record.slug in hint.slugs:
            break
    if not (await scheduler.capacity()).room and scheduler.capabilities.restarts:
        await scheduler.close()
    return tuple(one.state for one in snapshot.placements.get(record.slug, ()))
