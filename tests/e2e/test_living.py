"""No agent depends on the replica that started it: real, reporting agents are placed again after
that replica is gone."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.registry.consul import ConsulRegistry
from servers.consul import ConsulServer
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers, pytest.mark.asyncio(loop_scope="module")]

SHORT = """\
data_dir = "DATA"
resync   = "1s"
api {
  listen = "127.0.0.1:{port}"
}
agents {
  report_stale      = "4s"
  startup_grace     = "6s"
  startup_grace_min = "2s"
}
agent_class "default" {
  beat         = "1s"
  kill_timeout = "3s"
  variables    = VARIABLES
  probe "tcp" {
    port     = DEVICE
    interval = "1s"
    timeout  = "500ms"
  }
}
"""
ON_NOMAD = """\
backend   = "nomad"
shards    = SHARDS
lease_ttl = "2s"
nomad {
  address    = "NOMAD"
  job_prefix = "PREFIX"
  strategy   = "STRATEGY"
  drain      = "wait" # Nomad itself places agents of a drained node again
}
consul {
  address       = "CONSUL"
  prefix        = "PREFIX"
  agent_address = ""
}
"""


@dataclass(frozen=True, slots=True)
class Site:
    """A fleet's environment: a configuration except for the port, and a device that answers."""

    folder: Path
    config: str
    nomad: NomadServer | None = None
    prefix: str = ""

    def plane(self, name: str) -> ControlPlane:
        config = self.config.replace("DATA", str(self.folder / "data" / name))
        return ControlPlane(self.folder, name, config)

    async def jobs(self) -> list[dict[str, Any]]:
        assert self.nomad is not None
        found: list[dict[str, Any]] = await self.nomad.request(
            "GET", f"/v1/jobs?prefix={self.prefix}&meta=true"
        )
        return found

    async def running(self) -> Counter[tuple[str, str]]:
        """Device and node of each running allocation."""
        assert self.nomad is not None
        names = {job["ID"]: (job["Meta"] or {}).get("device_id", "") for job in await self.jobs()}
        allocs = await self.nomad.request("GET", "/v1/allocations")
        return Counter(
            (names[one["JobID"]], one["NodeName"])
            for one in allocs
            if one["JobID"] in names and one["ClientStatus"] == "running"
        )


@asynccontextmanager
async def device() -> AsyncIterator[int]:
    """The port of a server that answers."""
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def on_nomad(
    folder: Path, nomad: NomadServer, consul: ConsulServer, strategy: str, shards: int = 1
) -> AsyncIterator[Site]:
    prefix = f"v{uuid.uuid4().hex[:8]}"
    client = ConsulClient(ConsulAccess(address=consul.http_addr))
    try:
        await ConsulRegistry(client=client, prefix=prefix).initialise()
    finally:
        await client.close()
    async with device() as port:
        config = SHORT + ON_NOMAD
        for word, value in {
            "VARIABLES": f'{{ python = "{sys.executable}" }}',
            "DEVICE": str(port),
            "SHARDS": str(shards),
            "NOMAD": nomad.http_addr,
            "CONSUL": consul.http_addr,
            "PREFIX": prefix,
            "STRATEGY": strategy,
        }.items():
            config = config.replace(word, value)
        yield Site(folder, config, nomad, prefix)


async def watched(plane: ControlPlane, *names: str, timeout_s: float = 120.0) -> dict[str, Any]:
    """The devices, once each is watched."""
    found = {}
    for name in names:
        found[name] = await plane.until(
            f"/v1/devices/{name}", lambda said: said["verdict"] == "watched", timeout_s
        )
    return found


async def holder_of(*planes: ControlPlane) -> ControlPlane:
    async def one() -> ControlPlane | None:
        for plane in planes:
            if await plane.held():
                return plane
        return None

    found = await eventually(one, 60.0)
    assert isinstance(found, ControlPlane)
    return found


async def node(nomad: NomadServer, index: int) -> str:
    """The id of a node."""
    nodes = await nomad.request("GET", "/v1/nodes")
    (found,) = [one["ID"] for one in nodes if one["Name"].endswith(f"-{index}")]
    return str(found)


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.slow_because("starts a Nomad with two nodes and two control planes, and drains a node")
@pytest.mark.parametrize("strategy", ["dispatch", "register"])
async def test_agents_are_placed_after_the_replica_that_registered_them_is_killed(
    tmp_path: Path, consul: ConsulServer, strategy: str
) -> None:
    """The holder is killed and its node drained: its agents and new ones run on the second node,
    which fetches them from the remaining replica, and they report to it. No device has two."""
    async with (
        NomadServer(tmp_path / "nomad", clients=2) as nomad,
        on_nomad(tmp_path, nomad, consul, strategy) as site,
        site.plane("a") as one,
        site.plane("b") as two,
    ):
        first, second = await node(nomad, 0), await node(nomad, 1)
        eligible = f"/v1/node/{second}/eligibility"
        await nomad.request("POST", eligible, {"Eligibility": "ineligible"})
        holder = await holder_of(one, two)
        heir = two if holder is one else one
        for name in ("old-1", "old-2"):
            await holder.register(name)
        before = await watched(heir, "old-1", "old-2")
        await nomad.request("POST", eligible, {"Eligibility": "eligible"})
        holder.process.send(signal.SIGKILL)
        drain = {"DrainSpec": {"Deadline": 60_000_000_000}, "MarkEligible": False}
        await nomad.request("POST", f"/v1/node/{first}/drain", drain)
        await heir.register("new")

        async def moved() -> bool:
            place = f"watchdog-nomad-{1}"
            return await site.running() == {(n, place): 1 for n in ("new", "old-1", "old-2")}

        await eventually(moved, 120.0)
        after = await watched(heir, "new", "old-1", "old-2")
        assert all(after[name]["epoch"] > before[name]["epoch"] for name in before)
        events = await heir.call("GET", "/v1/events?limit=500")
        said = json.dumps(events)
        assert f"no replica is at {holder.api}" in said, said[:2000]
        meta = [job["Meta"] for job in await site.jobs() if not job["Stop"]]
        assert all(one["agent_source"].startswith(f"{heir.api}/") for one in meta)


@pytest.mark.slow_because("starts a control plane twice, and waits for reports that do not come")
@pytest.mark.parametrize(
    "backend",
    ["local", *(pytest.param(one, marks=pytest.mark.long) for one in ("dispatch", "register"))],
)
async def test_agents_report_again_after_the_control_plane_has_moved(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer, backend: str
) -> None:
    """The control plane stops and starts on another port: agents that know only the old address are
    replaced at the next epoch, and report."""
    async with AsyncExitStack() as stack:
        if backend == "local":
            port = await stack.enter_async_context(device())
            config = SHORT.replace("VARIABLES", "{}").replace("DEVICE", str(port))
            data = tmp_path / "data"
            site = Site(tmp_path, config.replace('"DATA"', f'"{data}"'))
        else:
            site = await stack.enter_async_context(on_nomad(tmp_path, nomad, consul, backend))
        async with site.plane("a") as plane:
            for number in range(8):  # more than a roll-out replaces at a time
                await plane.register(f"d-{number}")
            names = [f"d-{number}" for number in range(8)]
            before = await watched(plane, *names)
        async with site.plane("b") as plane:
            after = await watched(plane, *names)
            assert {name: after[name]["epoch"] for name in names} == {
                name: before[name]["epoch"] + 1 for name in names
            }
            for name in names:
                await plane.call("DELETE", f"/v1/devices/{name}")
            await plane.until("/v1/status", lambda status: status["placements"] == 0, 60.0)


@pytest.mark.slow_because("starts two control planes, and lets several resyncs pass")
async def test_equal_replicas_never_write_each_others_parents(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """Two replicas with different addresses share four shards, in which one agent runs: once they
    have settled, nothing is written to Nomad."""
    async with (
        on_nomad(tmp_path, nomad, consul, "dispatch", shards=4) as site,
        site.plane("a") as one,
        site.plane("b") as two,
    ):

        async def even() -> bool:
            return [len(await plane.held()) for plane in (one, two)] == [2, 2]

        await eventually(even, 60.0)
        await one.register("pump")
        await watched(one, "pump")

        async def parents() -> dict[str, int]:
            found = {job["ID"]: job["JobModifyIndex"] for job in await site.jobs()}
            return {name: index for name, index in found.items() if "/" not in name}

        settled = await parents()
        assert len(settled) == 4
        # Real time, because the absence of a change can't be waited for. It is five resyncs.
        await asyncio.sleep(5.0)
        assert await parents() == settled
        await one.call("DELETE", "/v1/devices/pump")
