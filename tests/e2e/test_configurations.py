"""Replica processes with different class specs on one Nomad and one Consul: one set is in force for
all agents."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.demo.process import clean_environment
from nomad_watchdog.registry.consul import ConsulRegistry
from servers.consul import ConsulServer
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers, pytest.mark.asyncio(loop_scope="module")]

TEMPLATE = Path(__file__).parents[1] / "schedulers" / "mock.nomad.hcl"
DEVICES = 12
CONFIG = """\
backend   = "nomad"
shards    = 4
lease_ttl = "2s"
resync    = "1s"
data_dir  = "{root}"
api {
  listen      = "127.0.0.1:{port}"
  own_address = "http://127.0.0.1:{port}"
  advertise   = "http://127.0.0.1:9"
}
rollout { at_once = 100 }
nomad {
  address    = "NOMAD"
  job_prefix = "PREFIX"
}
consul {
  address       = "CONSUL"
  prefix        = "PREFIX"
  agent_address = ""
}
agent_class "default" {
  template = "{root}/agent.nomad.hcl"
  probe "icmp" {}
}
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replicas, each with its own template; they differ in the requested memory, in MB."""

    nomad: NomadServer
    prefix: str
    one: ControlPlane
    two: ControlPlane

    def ask_for(self, plane: ControlPlane, memory: int) -> None:
        """Write the replica's template."""
        text = TEMPLATE.read_text().replace("memory = 10\n", f"memory = {memory}\n")
        assert f"memory = {memory}\n" in text
        plane.root.mkdir(parents=True, exist_ok=True)
        (plane.root / "agent.nomad.hcl").write_text(text)

    async def restart(self, plane: ControlPlane, end: signal.Signals = signal.SIGTERM) -> None:
        plane.process.send(end)
        await plane.process.wait()
        await plane.start()
        await plane.ready()

    async def jobs(self) -> dict[str, Any]:
        found = await self.nomad.request("GET", f"/v1/jobs?prefix={self.prefix}&meta=true")
        return {job["ID"]: job for job in found}

    async def memory(self) -> list[int]:
        """The memory that each agent that is not stopped actually has."""
        found = []
        for job in (await self.jobs()).values():
            if job.get("ParentID") and not job["Stop"]:
                whole = await self.nomad.request("GET", f"/v1/job/{quote(job['ID'], safe='')}")
                found.append(whole["TaskGroups"][0]["Tasks"][0]["Resources"]["MemoryMB"])
        return found

    async def all_have(self, memory: int) -> None:
        async def so() -> bool:
            return await self.memory() == [memory] * DEVICES

        await eventually(so, 60.0)

    async def in_force(self, plane: ControlPlane) -> dict[str, Any]:
        return dict((await plane.call("GET", "/v1/status"))["classes_in_force"])

    async def number(self) -> int:
        """The number of the set in force, as both see it."""

        async def agreed() -> int:
            one, two = [(await self.in_force(p))["number"] for p in (self.one, self.two)]
            return int(one) if one == two else 0

        return int(await eventually(agreed, 30.0))

    async def differs(self, plane: ControlPlane) -> bool:
        return bool((await self.in_force(plane))["differs"])

    async def even(self) -> bool:
        return sorted([len(await p.held()) for p in (self.one, self.two)]) == [2, 2]

    async def nothing_moves(self) -> None:
        """No job is written while both prepare theirs several times."""
        before = {name: job["JobModifyIndex"] for name, job in (await self.jobs()).items()}
        # Three rounds of `resync`: the absence of a write can't be waited for.
        await asyncio.sleep(3.5)
        after = {name: job["JobModifyIndex"] for name, job in (await self.jobs()).items()}
        assert after == before


async def command(plane: ControlPlane, *argv: str) -> tuple[str, str]:
    """Standard output and standard error of a command that reads the replica's file."""
    whole = [sys.executable, "-m", "nomad_watchdog", "--config", str(plane.file), *argv]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *whole,
        stdout=pipe,
        stderr=pipe,
        env={**clean_environment(), "NOMAD_WATCHDOG_ADDR": plane.api},
    )
    out, err = await asyncio.wait_for(process.communicate(), 60.0)
    return out.decode(), err.decode()


async def doctor(plane: ControlPlane) -> list[dict[str, Any]]:
    return list(json.loads((await command(plane, "doctor", "-o", "json"))[0])["checks"])


@asynccontextmanager
async def pair(folder: Path, nomad: NomadServer, consul: ConsulServer) -> AsyncIterator[Pair]:
    prefix = f"c{uuid.uuid4().hex[:8]}"
    words = {"NOMAD": nomad.http_addr, "CONSUL": consul.http_addr, "PREFIX": prefix}
    config = CONFIG
    for word, value in words.items():
        config = config.replace(word, value)
    client = ConsulClient(ConsulAccess(address=consul.http_addr))
    try:
        await ConsulRegistry(client=client, prefix=prefix).initialise()
    finally:
        await client.close()
    made = Pair(nomad, prefix, ControlPlane(folder, "a", config), ControlPlane(folder, "b", config))
    made.ask_for(made.one, 10)
    made.ask_for(made.two, 10)
    async with made.one, made.two:
        await eventually(made.even, 60.0)
        await asyncio.gather(*(made.one.register(f"device {n}") for n in range(DEVICES)))
        await made.all_have(10)
        yield made


@pytest.mark.long
@pytest.mark.slow_because("starts two control planes as programs and replaces all agents")
async def test_a_rolling_upgrade_and_a_crash_in_the_middle(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """The first upgraded replica brings its classes into force for the devices of both, once.
    Nothing is written after that while the other is configured differently, which it reports; a
    crash of either, and a restart with the old file, change nothing. Once the second is upgraded,
    both agree. A replica that has lost its template file continues with the text in the registry,
    even if it is the only replica left."""
    async with pair(tmp_path, nomad, consul) as both:
        assert await both.number() == 1
        await both.nothing_moves()
        both.ask_for(both.one, 12)
        await both.restart(both.one)
        await both.all_have(12)
        await eventually(both.even, 60.0)
        assert await both.number() == 2
        assert (await both.differs(both.one), await both.differs(both.two)) == (False, True)
        await both.nothing_moves()
        leases = await both.one.call("GET", "/v1/leases")
        assert len({one["config"] for one in leases["replicas"]}) == 2
        plan = json.loads((await command(both.two, "plan", "-o", "json"))[0])
        assert (plan["actions"], plan["waiting_rollout"]) == ([], 0)
        assert "text of the template changed" in plan["not_in_force"][0]
        checks = {one["name"]: one for one in await doctor(both.two)}
        assert checks["classes in force"]["status"] == "warn"
        assert "this file differs in class default" in checks["classes in force"]["found"]
        assert "replicas are configured differently" in (await command(both.one, "leader"))[1]

        await both.restart(both.two, signal.SIGKILL)
        assert await both.differs(both.two)
        await both.restart(both.one, signal.SIGKILL)
        await eventually(both.even, 60.0)
        assert await both.number() == 2
        both.ask_for(both.two, 12)
        await both.two.call("POST", "/v1/config:reload")
        assert not await both.differs(both.two)
        assert await both.number() == 2
        assert await both.memory() == [12] * DEVICES
        checks = {one["name"]: one for one in await doctor(both.two)}
        assert checks["classes in force"]["status"] == "ok"
        stored = json.dumps((await both.two.call("GET", "/v1/events?kind=classes"))["items"])
        assert "classes.agree" in stored

        (both.two.root / "agent.nomad.hcl").unlink()
        await both.restart(both.two)
        status = await both.two.call("GET", "/v1/status")
        assert "No such file" in status["classes_in_force"]["unreadable"]["default"]
        assert (status["classes_in_force"]["differs"], status["unprepared_classes"]) == ([], {})
        both.one.process.send(signal.SIGKILL)
        await both.two.register("one more")

        async def placed() -> bool:
            return await both.memory() == [12] * (DEVICES + 1)

        await eventually(placed, 60.0)
        assert (await both.in_force(both.two))["number"] == 2


@pytest.mark.long
@pytest.mark.slow_because("starts two control planes as programs and replaces all agents twice")
async def test_a_rollback_counts_with_the_last_replica(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """By reloads: both change to a newer template. The first to go back changes nothing and reports
    it, and a crash of the other one changes nothing either. When the last one goes back, the older
    template is in force for all."""
    async with pair(tmp_path, nomad, consul) as both:
        for plane in (both.one, both.two):
            both.ask_for(plane, 12)
            await plane.call("POST", "/v1/config:reload")
        await both.all_have(12)
        both.ask_for(both.one, 10)
        await both.one.call("POST", "/v1/config:reload")
        assert await both.differs(both.one)
        both.two.process.send(signal.SIGKILL)
        await both.two.process.wait()
        await both.one.until("/v1/leases", lambda said: len(said["replicas"]) == 1)
        assert (await both.in_force(both.one))["number"] == 2
        assert await both.memory() == [12] * DEVICES
        await both.two.start()
        await both.two.ready()
        assert await both.number() == 2
        both.ask_for(both.two, 10)
        await both.two.call("POST", "/v1/config:reload")
        await both.all_have(10)
        assert await both.number() == 3
        assert not await both.differs(both.one)
        await both.nothing_moves()
