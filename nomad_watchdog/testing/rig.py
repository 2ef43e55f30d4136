"""The basis of the conformance checks: the rig of a backend, and the devices of one check."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import Slug, parse_device_id, slug_of
from nomad_watchdog.model import (
    AgentSpec,
    Device,
    DeviceRecord,
    Epoch,
    Placement,
    PlacementState,
    Presence,
    WallTime,
)
from nomad_watchdog.schedulers import Scheduler


@dataclass(frozen=True, slots=True)
class Rig:
    """One backend under test."""

    scheduler: Callable[[], Scheduler]
    """Returns a new instance over the same backend. Two instances act like two reconcilers that race."""
    spec: Callable[..., AgentSpec]
    """The usual test agent; keywords replace fields. It runs until SIGTERM."""
    failing_spec: Callable[[], AgentSpec]
    """An agent that exits with 1 at once."""
    scale_spec: Callable[[], AgentSpec]
    """The cheapest placement of the backend, for a thousand ids; may be the usual one."""
    processes: Callable[[Slug], Awaitable[set[int]]]
    """Pids, or other unique numbers, of the live agent processes of one device (S3)."""
    crash: Callable[[Placement], Awaitable[None]] | None = None
    """Kill the process of a placement without the backend (SIGKILL); None = not possible."""
    break_reads: Callable[[], AbstractAsyncContextManager[None]] | None = None
    """While entered, the backend cannot be read completely; None = not possible."""
    timeout_s: float = 30.0
    grace_s: float = 5.0


Maker = Callable[[], AbstractAsyncContextManager[Rig]]
Check = Callable[[Rig], Awaitable[None]]

_PERIOD_S: Final = 0.05
_PAUSE: Final = 4
"""Pause between two polls, as a multiple of the duration of the last one."""
LIVE: Final = frozenset(PlacementState) - {PlacementState.DEAD}


def record_of(device_id: str) -> DeviceRecord:
    """The record of a device that is present."""
    checked = parse_device_id(device_id)
    return DeviceRecord(
        slug=slug_of(checked),
        device=Device(id=checked, agent_class="default", address="127.0.0.1"),
        presence=Presence.PRESENT,
        generation=1,
        epoch=Epoch(1),
        instance="",
        changed_at=WallTime(0.0),
    )


@dataclass(slots=True)
class Bench:
    """One scheduler and the devices of one check."""

    rig: Rig
    scheduler: Scheduler
    spec: AgentSpec
    made: set[Slug] = field(default_factory=set)

    def device(self, prefix: str = "device") -> DeviceRecord:
        record = record_of(f"{prefix}-{uuid.uuid4()}")
        self.made.add(record.slug)
        return record

    async def of(self, slug: Slug) -> tuple[Placement, ...]:
        return (await self.scheduler.snapshot(only=[slug])).placements.get(slug, ())

    async def alive(self, slug: Slug) -> list[Placement]:
        return [one for one in await self.of(slug) if one.state in LIVE]

    async def until(self, what: str, test: Callable[[], Awaitable[bool]]) -> None:
        """Poll until the test is true. A TransientError counts as false.

        The pause is longer after a test that took long, because frequent polls of a thousand placements would slow
        down the backend."""
        clock = SystemClock()
        deadline = clock.monotonic() + self.rig.timeout_s
        while (began := clock.monotonic()) < deadline:
            try:
                if await test():
                    return
            except TransientError:
                pass
            await asyncio.sleep(max(_PERIOD_S, _PAUSE * (clock.monotonic() - began)))
        seen = {slug: await self.of(slug) for slug in sorted(self.made)[:3]}
        raise AssertionError(f"not within {self.rig.timeout_s} s: {what}; last seen: {seen}")

    async def running(self, record: DeviceRecord) -> Placement:
        async def test() -> bool:
            found = await self.alive(record.slug)
            up = [one for one in found if one.state is PlacementState.RUNNING]
            return len(up) == 1 and len(await self.rig.processes(record.slug)) == 1

        await self.until(f"one running placement with one process for {record.slug}", test)
        return (await self.alive(record.slug))[0]

    async def start(self, prefix: str = "device") -> tuple[DeviceRecord, Placement]:
        record = self.device(prefix)
        await self.scheduler.ensure(record, Epoch(1), self.spec)
        return record, await self.running(record)

    async def gone(self, slugs: Collection[Slug]) -> None:
        async def dead() -> bool:
            seen = await self.scheduler.snapshot(only=slugs)
            return not any(one.state in LIVE for all_ in seen.placements.values() for one in all_)

        async def no_process() -> bool:
            return not [slug for slug in slugs if await self.rig.processes(slug)]

        await self.until(f"{len(slugs)} devices without a live placement", dead)
        await self.until(f"{len(slugs)} devices without a process", no_process)

    async def retire_all(self) -> None:
        if not self.made:
            return
        seen = await self.scheduler.snapshot(only=self.made)
        live = [one for all_ in seen.placements.values() for one in all_ if one.state in LIVE]
        for some in _batches(live, 32):
            await asyncio.gather(*(self.scheduler.retire(one, self.rig.grace_s) for one in some))
        await self.gone(self.made)


def _batches(items: list[Placement], size: int) -> Iterable[list[Placement]]:
    return (items[at : at + size] for at in range(0, len(items), size))


@asynccontextmanager
async def bench_of(rig: Rig, spec: AgentSpec | None = None) -> AsyncIterator[Bench]:
    bench = Bench(rig, rig.scheduler(), spec or rig.spec())
    try:
        await bench.scheduler.prepare([bench.spec])
        try:
            yield bench
        finally:
            await bench.retire_all()
    finally:
        await bench.scheduler.close()


def hostile_device_ids(count: int) -> list[str]:
    """`count` different valid ids that are difficult: markup, paths, similar ids, 128 bytes."""
    stems = [
        "../../etc/passwd", "${x}", "{{x}}", "%s%n%00", "a'b\"c`d", "$(id)", "; rm -rf /", "-rf",
        "кран-7", "機器", "🙂🙃", "d-1", "d-10", "D-1", "a/b", "a\\b", "<b>&amp;", "#", "?x=1&y",
        "e\u0301", "\u00e9", "null", "*", ".", "..", "~", "{}", '{"a":1}', "x" * 128, "😀" * 32,
    ]  # fmt: skip
    found = dict.fromkeys(stems[:count])
    number = 0
    while len(found) < count:
        stem = stems[number % len(stems)][:20]
        found[f"{stem}·{number}"] = None
        number += 1
    return list(found)
