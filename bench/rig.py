"""What the benchmarks on a real Nomad share: a server, bare dispatches, a control plane, and waiting.

Agents are tasks of Nomad's mock driver: they cost the scheduler and the client what a task costs, and
the machine no process. Nothing is waited for without a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from nomad_watchdog.clients.nomad import NomadClient, NomadSettings
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.dev.nomad import NomadServer
from nomad_watchdog.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.ledger import Ledger
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import (
    AgentSpec,
    Device,
    DeviceRecord,
    Epoch,
    Limits,
    Presence,
    WallTime,
)
from nomad_watchdog.reconciler import Reconciler
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.schedulers import _nomad_jobs
from nomad_watchdog.schedulers.nomad import NomadScheduler

TEMPLATE = Path(__file__).resolve().parents[1] / "tests/schedulers/mock.nomad.hcl"
SPEC = AgentSpec("default", "1", "bench", template=str(TEMPLATE), kill_timeout_s=1.0)


@asynccontextmanager
async def server() -> AsyncIterator[tuple[NomadServer, Path]]:
    """A Nomad of our own and a folder; both are gone at the end, whatever it still ran."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        async with NomadServer(Path(folder) / "nomad") as nomad:
            yield nomad, Path(folder)


def say(text: str) -> None:
    print(f"      {text}", file=sys.stderr, flush=True)


def device(name: str) -> Device:
    return Device(DeviceId(name), "default", "127.0.0.1")


def body(name: str) -> dict[str, Any]:
    """What our reconciler would send to start this device's agent."""
    one = device(name)
    record = DeviceRecord(
        slug_of(one.id), one, Presence.PRESENT, 1, Epoch(1), "", WallTime(0.0), index=1
    )
    told = _nomad_jobs.meta(record, record.epoch, SPEC, 0)
    return _nomad_jobs.dispatch_body(_nomad_jobs.payload(record, record.epoch, SPEC), told)


class Bare:
    """Dispatches with nothing around them: aiohttp, kept-alive connections, bodies made before."""

    def __init__(self, nomad: NomadServer, prefix: str) -> None:
        self.nomad, self.prefix = nomad, prefix
        self._url = f"{nomad.http_addr}/v1/job/{prefix}/dispatch"
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60.0))

    async def prepare(self) -> None:
        """Register the parent job, by the code that registers ours."""
        scheduler = NomadScheduler(
            settings=NomadSettings(address=self.nomad.http_addr), prefix=self.prefix
        )
        try:
            await scheduler.prepare([SPEC])
        finally:
            await scheduler.close()

    async def one(self, content: dict[str, Any]) -> float:
        """Seconds until Nomad's answer."""
        began = time.perf_counter()
        async with self._session.post(self._url, json=content) as answer:
            answer.raise_for_status()
            await answer.json()
        return time.perf_counter() - began

    async def many(self, contents: Sequence[dict[str, Any]], at_once: int) -> list[float]:
        """Seconds from the start of the loop to each answer, in the order of the answers."""
        todo = iter(contents)
        began = time.perf_counter()
        answered: list[float] = []

        async def work() -> None:
            for content in todo:
                await self.one(content)
                answered.append(time.perf_counter() - began)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
        return answered

    async def close(self) -> None:
        await self._session.close()


@dataclass(frozen=True, slots=True)
class Plane:
    """The parts of a control plane in this process, as nomad_watchdog/app.py puts them together."""

    registry: SqliteRegistry
    scheduler: NomadScheduler
    metrics: Metrics
    fleet: Fleet
    reconciler: Reconciler

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The reconciler runs until the end; it has to be ready within a minute."""
        task = asyncio.get_running_loop().create_task(self.reconciler.run())
        try:
            await asyncio.wait_for(self.fleet.ready_event.wait(), 60.0)
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task  # raises what ended it, if it was not we


@asynccontextmanager
async def plane(
    nomad: NomadServer, path: Path, prefix: str, *, client: NomadClient | None = None
) -> AsyncIterator[Plane]:
    """A control plane that does not run yet, on the registry at path, made if it is not there."""
    registry = SqliteRegistry(path=path)
    installation = await registry.initialise()
    scheduler = NomadScheduler(
        client=client or NomadClient(NomadSettings(address=nomad.http_addr)),
        installation=installation,
        prefix=prefix,
    )
    metrics = Metrics()
    fleet = Fleet(registry, Limits(), SystemClock())
    fleet.on_commit = metrics.committed
    reconciler = Reconciler(fleet, scheduler, {SPEC.agent_class: SPEC}, metrics)
    try:
        yield Plane(registry, scheduler, metrics, fleet, reconciler)
    finally:
        await scheduler.close()
        await registry.close()


async def enrol(path: Path, names: Sequence[str]) -> None:
    """Put devices into the registry at path, as somebody else would: the next reader finds them."""
    registry = SqliteRegistry(path=path)
    try:
        await registry.initialise()
        await Ledger(registry, SystemClock()).register([device(name) for name in names])
    finally:
        await registry.close()


async def children(nomad: NomadServer, prefix: str) -> list[dict[str, Any]]:
    """The allocations of a parent's children."""
    wanted = quote(f'JobID matches "^{prefix}/"', safe="")
    timeout = aiohttp.ClientTimeout(total=60.0)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"{nomad.http_addr}/v1/allocations?filter={wanted}") as answer,
    ):
        answer.raise_for_status()
        found: list[dict[str, Any]] = await answer.json()
    return found


async def until_running(
    nomad: NomadServer, prefix: str, count: int, timeout_s: float = 300.0
) -> list[dict[str, Any]]:
    """The running allocations, once they are exactly `count` and none is on its way.

    Raises RuntimeError when there are more: then something was started twice."""
    found: list[dict[str, Any]] = []

    async def settled() -> bool:
        nonlocal found
        live = [
            one
            for one in await children(nomad, prefix)
            if one["DesiredStatus"] == "run" and one["ClientStatus"] in {"pending", "running"}
        ]
        if len(live) > count:
            raise RuntimeError(f"{prefix}: {len(live)} live agents for {count} devices")
        found = [one for one in live if one["ClientStatus"] == "running"]
        return len(found) == count

    await until(settled, f"{count} agents of {prefix} to run", timeout_s, every_s=0.5)
    return found


async def until(
    test: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float, every_s: float = 0.02
) -> None:
    """Return when test says so. Raises TimeoutError naming `what`."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = test()
        if result if isinstance(result, bool) else await result:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        await asyncio.sleep(every_s)


def slug_of_child(job_id: str) -> str:
    """`<parent>/dispatch-<slug>-<seconds>-<8 hex>` → slug."""
    return job_id.partition("/dispatch-")[2].rsplit("-", 2)[0]


def tidy() -> None:
    """Collect before a side is timed, so that neither pays for the other's rubbish."""
    gc.collect()
