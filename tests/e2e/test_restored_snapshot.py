"""Consul's store is restored to an old snapshot while a control plane runs."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.registry.consul import ConsulRegistry
from servers.consul import ConsulServer
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers]

TEMPLATE = Path(__file__).parents[1] / "schedulers" / "mock.nomad.hcl"
CONFIG = """\
backend   = "nomad"
lease_ttl = "2s"
resync    = "2s"
data_dir  = "{root}"
api {
  listen = "127.0.0.1:{port}"
}
nomad {
  address = "NOMAD"
}
consul {
  address       = "CONSUL"
  agent_address = ""
}
agent_class "default" {
  template = "TEMPLATE"
  probe "icmp" {}
}
"""
NAMES = [f"pump {number}" for number in range(6)]


@pytest.mark.slow_because(
    "starts a Consul and a Nomad of its own, and agents are placed three times"
)
async def test_s1_epochs_do_not_go_back_with_the_store(tmp_path: Path) -> None:
    """Agents placed after the snapshot are newer than the registry: they are replaced under epochs
    never used before, and never accepted again under old ones; the other agents stay. The restored
    snapshot is reported."""
    async with (
        ConsulServer(tmp_path / "consul") as consul,
        NomadServer(tmp_path / "nomad") as nomad,
        aiohttp.ClientSession() as http,
        AsyncExitStack() as ended,
    ):
        client = ConsulClient(ConsulAccess(address=consul.http_addr))
        ended.push_async_callback(client.close)
        registry = ConsulRegistry(client=client)
        await registry.initialise()
        config = CONFIG.replace("NOMAD", nomad.http_addr).replace("CONSUL", consul.http_addr)
        config = config.replace("TEMPLATE", str(TEMPLATE))

        async def jobs() -> list[dict[str, Any]]:
            found = await nomad.request("GET", "/v1/jobs?prefix=device-watchdog&meta=true")
            return [job for job in found if job.get("ParentID")]

        async def running() -> dict[str, int]:
            return {
                job["Meta"]["device_id"]: int(job["Meta"]["epoch"])
                for job in await jobs()
                if job["Status"] == "running"
            }

        async with ControlPlane(tmp_path, "plane", config) as plane:
            for name in NAMES:
                await plane.register(name)

            async def at(first: int, rest: int) -> bool:
                want = {name: first if name in NAMES[:3] else rest for name in NAMES}
                return await running() == want

            await eventually(lambda: at(1, 1), 40.0)
            async with http.get(f"{consul.http_addr}/v1/snapshot") as answer:
                snapshot = await answer.read()
            for job in await jobs():
                if job["Meta"]["device_id"] in NAMES[:3]:
                    await nomad.request("DELETE", f"/v1/job/{job['ID'].replace('/', '%2F')}")
            await eventually(lambda: at(2, 1), 60.0)
            async with http.put(f"{consul.http_addr}/v1/snapshot", data=snapshot) as answer:
                assert answer.status == 200, await answer.text()
            status = await plane.until("/v1/status", lambda status: status["registry_restored"])
            assert (
                "3 devices have an older record than before (pump 0, "
                in status["registry_restored"]
            )
            events = (await plane.call("GET", "/v1/events?kind=registry.restored"))["items"]
            assert [event["data"]["older"] for event in events] == [3]
            await eventually(lambda: at(3, 1), 60.0)
            stored = {r.device.id: r.epoch for r in (await registry.read()).records.values()}
            assert stored == {name: 3 if name in NAMES[:3] else 1 for name in NAMES}
            ever = Counter((job["Meta"]["device_id"], job["Meta"]["epoch"]) for job in await jobs())
            assert set(ever.values()) == {1}
