"""The scheduler contract on a real Nomad, in both strategies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nomad_watchdog.clients.nomad import NomadAccess
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec, Placement
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.testing.conformance import CHECKS, Rig, hostile_ids_map_back
from servers.nomad import NomadServer
from tests.schedulers.conftest import CHECKS_BY_LENGTH, FEW

AGENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
while True:
    time.sleep(60)
"""


def processes_of(slug: str) -> dict[int, dict[str, str]]:
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            raw = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        env = dict(one.split("=", 1) for one in raw if "=" in one)
        if env.get("NOMAD_META_slug") == slug and parent:
            found[int(entry.name)] = env
    return found


def make_rig(nomad: NomadServer, folder: Path, strategy: str) -> Rig:
    agent, failing = folder / "agent.py", folder / "failing.py"
    agent.write_text(AGENT)
    failing.write_text("raise SystemExit(1)\n")
    base = AgentSpec(
        "default", "1", "hash-1", cpu_mhz=20, kill_timeout_s=3.0,
        variables={"python": sys.executable, "agent_path": str(agent), "restart_delay": "1s"},
    )  # fmt: skip
    mock = str(Path(__file__).with_name("mock.nomad.hcl"))
    prefix = f"t-{uuid.uuid4().hex[:8]}"

    def scheduler() -> NomadScheduler:
        return NomadScheduler(
            settings=NomadAccess(address=nomad.http_addr),
            strategy=strategy,  # type: ignore[arg-type]
            installation="test",
            prefix=prefix,
        )

    async def processes(slug: Slug) -> set[int]:
        return set(await asyncio.to_thread(processes_of, slug))

    async def crash(placement: Placement) -> None:
        for pid in processes_of(placement.slug):
            os.kill(pid, signal.SIGKILL)

    @asynccontextmanager
    async def break_reads() -> AsyncIterator[None]:
        await nomad.kill()
        try:
            yield
        finally:
            await nomad.restart()
            await nomad.wait_ready()

    return Rig(
        scheduler=scheduler,
        spec=lambda **changes: replace(base, **changes),
        failing_spec=lambda: replace(
            base, spec_hash="f", variables={**base.variables, "agent_path": str(failing)}
        ),
        scale_spec=lambda: replace(base, spec_hash="m", template=mock, variables={}),
        processes=processes,
        crash=crash,
        break_reads=break_reads,
        timeout_s=120.0,
        grace_s=3.0,
    )


pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.parametrize("strategy", ["dispatch", "register"]),
]


@pytest.mark.parametrize("name", CHECKS_BY_LENGTH)
async def test_nomad_keeps_the_contract(
    nomad: NomadServer, tmp_path: Path, strategy: str, name: str
) -> None:
    """Each check of the suite passes on a real Nomad."""
    await CHECKS[name](make_rig(nomad, tmp_path, strategy))


async def test_some_hostile_ids_map_back(nomad: NomadServer, tmp_path: Path, strategy: str) -> None:
    """The slowest check of the suite, with fewer devices."""
    await hostile_ids_map_back(make_rig(nomad, tmp_path, strategy), FEW)
