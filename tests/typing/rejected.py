"""Mistakes in uses of the public API. mypy must reject each line that has a `type: ignore` comment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from watchdog_agent.runtime.types import PluginAnswer, PluginLoop, ProbePlugin, RepairPlugin

from nomad_watchdog.ids import DeviceId, Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement, Presence
from nomad_watchdog.registry import Registry, RegistryDocument
from nomad_watchdog.schedulers import Capabilities, Hint, Scheduler, Snapshot
from nomad_watchdog.testing.conformance import Rig, check_scheduler
from tests.typing.accepted_backend import MemoryScheduler, maker, rig
from tests.typing.accepted_registry import MemoryRegistry


class WithoutSweep:
    """A backend that lacks a method."""

    name = "incomplete"
    capabilities = Capabilities()


class SynchronousEnsure(MemoryScheduler):
    def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:  # type: ignore[override]  # not async
        return 1


class WrongWatch(MemoryScheduler):
    async def watch(self) -> AsyncIterator[str]:  # type: ignore[override]  # not of hints
        yield ""


class TextRegistry(MemoryRegistry):
    async def get(self, slug: Slug) -> str | None:  # type: ignore[override]  # not a record
        return slug


def incomplete_backend() -> Scheduler:
    return WithoutSweep()  # type: ignore[return-value]


def backend_as_registry() -> Registry:
    return MemoryScheduler(installation="", shards=1)  # type: ignore[return-value]


async def scheduler_misuse(scheduler: Scheduler, record: DeviceRecord, spec: AgentSpec) -> None:
    await scheduler.ensure(record, 1, spec)  # type: ignore[arg-type]  # a number is no epoch
    await scheduler.ensure(record, Epoch(1))  # type: ignore[call-arg]
    await scheduler.retire(record, 5.0)  # type: ignore[arg-type]  # a record is no placement
    await scheduler.snapshot(["camera"])  # type: ignore[list-item]  # a text is no slug
    scheduler.capabilities.restarts = True  # type: ignore[misc]  # frozen
    scheduler.restart()  # type: ignore[attr-defined]
    _: Hint = await scheduler.watch()  # type: ignore[misc]  # an iterator is not awaited


async def snapshot_misuse(snapshot: Snapshot, placement: Placement) -> None:
    snapshot.placements[placement.slug] = (placement,)  # type: ignore[index]  # read-only
    placement.epoch = Epoch(2)  # type: ignore[misc]  # frozen
    _: str = placement.state.value + 1  # type: ignore[operator]


async def registry_misuse(registry: Registry, record: DeviceRecord) -> None:
    await registry.commit(record)  # type: ignore[arg-type]  # one record is no sequence
    await registry.commit([record], ["lock"])  # type: ignore[list-item]  # a text is no guard
    await registry.get(DeviceId("camera"))  # type: ignore[arg-type]  # an id is no slug
    await registry.commit_document("pauses", b"{}")  # type: ignore[arg-type]
    (stored,) = await registry.commit([record])
    _ = stored.index  # type: ignore[union-attr]  # None where the compare-and-set lost
    RegistryDocument(body="{}")  # type: ignore[arg-type]
    registry.poisoned["key"] = "wrong"  # type: ignore[index]  # read-only
    record.presence = Presence.ABSENT  # type: ignore[misc]  # frozen


async def conformance_misuse() -> None:
    await check_scheduler(rig)  # type: ignore[arg-type]  # a rig is no context manager
    await check_scheduler(maker, only="ensure_twice_is_one", hostile_ids="10")  # type: ignore[arg-type]
    Rig(scheduler=rig().scheduler)  # type: ignore[call-arg]
    Rig(
        scheduler=lambda: "nomad",  # type: ignore[arg-type,return-value]
        spec=rig().spec,
        failing_spec=rig().failing_spec,
        scale_spec=rig().scale_spec,
        processes=rig().processes,
    )


def swapped(
    settings: Mapping[str, object],
    loop: PluginLoop,
    address: str,
    timeout_s: float,
    ended: PluginAnswer,
) -> None:
    del settings, loop, address, timeout_s, ended


def without_answer(loop: PluginLoop, step: object, device: object) -> None:
    del loop, step, device


def returns_text(loop: PluginLoop, step: object, device: object, ended: PluginAnswer) -> str:
    del loop, step, device, ended
    return "done"


PROBES: Mapping[str, ProbePlugin] = {
    "swapped": swapped,  # type: ignore[dict-item]
}
REPAIRS: Mapping[str, RepairPlugin] = {
    "without-answer": without_answer,  # type: ignore[dict-item]
    "returns-text": returns_text,  # type: ignore[dict-item]
}


def plugin_misuse(loop: PluginLoop, ended: PluginAnswer) -> None:
    ended("yes", "answered")  # type: ignore[arg-type]
    loop.later("1s", lambda: None)  # type: ignore[arg-type]
    loop.run()  # type: ignore[attr-defined]
    print(ended(True, "done"))  # type: ignore[func-returns-value]
