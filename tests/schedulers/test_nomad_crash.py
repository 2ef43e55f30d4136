"""A real Nomad server that is killed while it stores starts."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.clients.nomad_features import Feature
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import TransientError
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Monotonic, PlacementState
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.schedulers.nomad._view import SECOND_LOOK_S
from nomad_watchdog.testing.conformance import record_of
from servers.nomad import NomadServer
from tests.schedulers.conftest import eventually

SPEC = AgentSpec("default", "1", "h", template=str(Path(__file__).with_name("mock.nomad.hcl")))
AT_ONCE = 24
ROUNDS = 10


class Ahead(SystemClock):
    """The machine's clock, which the test can set forward."""

    ahead_s = 0.0

    def monotonic(self) -> Monotonic:
        return Monotonic(super().monotonic() + self.ahead_s)


async def forgotten(nomad: NomadServer, prefix: str) -> list[str]:
    """Jobs without any evaluation."""
    jobs = await nomad.request("GET", f"/v1/jobs?prefix={prefix}/dispatch-")
    pending = [job["ID"] for job in jobs if job["Status"] == "pending"]
    paths = [f"/v1/job/{quote(one, safe='')}/evaluations" for one in pending]
    return [
        one
        for one, path in zip(pending, paths, strict=True)
        if not await nomad.request("GET", path)
    ]


async def interrupted(nomad: NomadServer, scheduler: NomadScheduler, number: int) -> None:
    """Start agents, some of which the server's death interrupts; no start is repeated."""
    records = [record_of(f"d-{number}-{n}") for n in range(AT_ONCE)]

    async def start(record: DeviceRecord) -> None:
        try:
            await scheduler.ensure(record, Epoch(1), SPEC)
        except TransientError:
            return

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(start(record)) for record in records]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await nomad.kill()
    await nomad.restart()
    await nomad.wait_ready()


async def test_no_start_is_forgotten_when_server_and_control_plane_crash(tmp_path: Path) -> None:
    """If a crashed server left jobs without an evaluation, they run after a new control plane has
    seen them, although their starts are not repeated (L2). Servers that write job and evaluation at
    once leave no such jobs."""
    prefix = f"t-{uuid.uuid4().hex[:8]}"
    async with NomadServer(tmp_path / "nomad") as nomad:
        client = NomadClient(NomadAccess(address=nomad.http_addr))
        clock = Ahead()
        first = NomadScheduler(client=client, prefix=prefix)
        left: list[str] = []
        try:
            await first.prepare([SPEC])
            for number in range(ROUNDS):
                await interrupted(nomad, first, number)
                left = await forgotten(nomad, prefix)
                if left:
                    break
            atomic = (await client.features()).has(Feature.ATOMIC_DISPATCH)
            assert bool(left) is not atomic
            successor = NomadScheduler(client=client, prefix=prefix, clock=clock)
            await successor.snapshot()
            clock.ahead_s = SECOND_LOOK_S
            await successor.prepare([SPEC])

            async def all_run() -> Any:
                placed = (await successor.snapshot()).placements.values()
                found = [one.state for some in placed for one in some]
                return found and set(found) == {PlacementState.RUNNING}

            await eventually(all_run, 60.0)
            assert not await forgotten(nomad, prefix)
        finally:
            await client.close()
