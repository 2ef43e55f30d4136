"""Shared parts of the Nomad benchmarks: a server, and our control plane in this process."""

from __future__ import annotations

import asyncio
import base64
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.load import load
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.core.actions import Action, ActionKind, ActionOutcome
from nomad_watchdog.daemon.factory import open_registry, open_scheduler
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Device
from servers.nomad import NomadServer

TEMPLATE = Path(__file__).with_name("mock.nomad.hcl")
KEYS = ("device_id", "slug", "epoch", "spec_hash", "agent_class", "shard")
FLEET = """\
registry {{
  kind = "sqlite"
}}
consul {{
  agent_address = ""
}}
agent_class "default" {{
  template = "{template}"
  probe "icmp" {{}}
}}
"""
CONFIG = """\
backend  = "nomad"
data_dir = "{root}"
nomad {{
  address    = "{nomad}"
  job_prefix = "{prefix}"
}}
"""


@asynccontextmanager
async def nomad_server(*, schedulers: bool = True) -> AsyncIterator[tuple[NomadServer, Path]]:
    """A separate Nomad and a directory; both are removed at the end."""
    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-bench-") as folder:
        async with NomadServer(Path(folder) / "nomad", schedulers=schedulers) as server:
            yield server, Path(folder)


async def until_placed(server: NomadServer, timeout_s: float) -> None:
    """Wait until Nomad's schedulers have no work left. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while await server.request("GET", "/v1/evaluations?status=pending&per_page=1"):
            await asyncio.sleep(2.0)


def settings(server: NomadServer, root: Path, prefix: str) -> tuple[Settings, Path]:
    """Settings as a user would write them, and their file."""
    root.mkdir(exist_ok=True)
    file = root / f"{prefix}.hcl"
    file.write_text(
        (CONFIG + FLEET).format(root=root, nomad=server.http_addr, prefix=prefix, template=TEMPLATE)
    )
    return load(file), file


class Plane:
    """A fleet and its reconciler; `started` maps a slug to the time at which its dispatch was answered."""

    def __init__(self, fleet: Fleet, reconciler: Reconciler) -> None:
        self.fleet = fleet
        self.reconciler = reconciler
        self.started: dict[str, float] = {}
        self._news = asyncio.Event()

        def done(action: Action, outcome: ActionOutcome, _took_s: float) -> None:
            if action.kind is ActionKind.START and outcome is ActionOutcome.OK:
                self.started[action.slug] = time.perf_counter()
                self._news.set()

        reconciler.executor.ended.connect(done)

    async def register(self, names: list[str]) -> None:
        for first in range(0, len(names), 1000):
            await self.fleet.records.register(
                [Device(DeviceId(n), "default", "127.0.0.1") for n in names[first : first + 1000]]
            )

    async def until_started(self, count: int, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while len(self.started) < count:
                self._news.clear()
                await self._news.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.reconciler.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def plane(chosen: Settings) -> AsyncIterator[Plane]:
    """A control plane that is not started yet."""
    async with open_registry(chosen) as registry:
        installation = await registry.initialise()
        async with open_scheduler(chosen, installation) as scheduler:
            fleet = Fleet(registry, chosen.limits(), SystemClock())
            yield Plane(fleet, Reconciler(fleet, scheduler, chosen.specs(), Metrics()))


@asynccontextmanager
async def bare_client(server: NomadServer, *parents: str) -> AsyncIterator[NomadClient]:
    """Our HTTP client, with parent jobs of these names for dispatches."""
    client = NomadClient(NomadAccess(address=server.http_addr))
    try:
        job = await client.parse(TEMPLATE.read_text(), "")
        for parent in parents:
            await client.register({**job, "ID": parent, "Name": parent})
        yield client
    finally:
        await client.close()


def bare_body(name: str) -> dict[str, Any]:
    """A dispatch of the same form as ours, with dummy content."""
    return {
        "Meta": dict.fromkeys(KEYS, name),
        "Payload": base64.b64encode(b'{"v":1}' * 80).decode(),
        "IdempotencyToken": name,
        "IdPrefixTemplate": name,
    }


async def bare_loop(client: NomadClient, parent: str, count: int, at_once: int) -> float:
    """Seconds for `count` dispatches, `at_once` concurrently."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await client.dispatch(parent, bare_body(f"{parent}-{number}"))

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return time.perf_counter() - began
