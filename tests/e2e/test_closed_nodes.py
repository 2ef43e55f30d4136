"""A Nomad node is drained or made ineligible while the control plane runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers]

TEMPLATE = Path(__file__).parents[1] / "schedulers" / "mock.nomad.hcl"
CONFIG = """\
backend  = "nomad"
resync   = "10m"
data_dir = "{root}"
registry {
  kind = "sqlite"
}
api {
  listen = "127.0.0.1:{port}"
}
nomad {
  address = "NOMAD"
}
consul {
  agent_address = ""
}
agent_class "default" {
  template = "TEMPLATE"
  probe "icmp" {}
}
"""


@pytest.mark.slow_because("starts a Nomad of its own, as no node of a shared one may be drained")
async def test_a_drain_is_reported_when_it_begins_and_when_it_ends(tmp_path: Path) -> None:
    """With a resync of ten minutes, `status` and `explain` show the drain as soon as the
    scheduler's event arrives. The agent stays, because no other node takes agents. Each change is one event, and a restart of the control plane does not
    publish it again. An agent that no node takes has that reason in `status` and in its device's
    verdict, and no start is put on hold."""
    async with NomadServer(tmp_path / "nomad") as nomad:
        config = CONFIG.replace("NOMAD", nomad.http_addr).replace("TEMPLATE", str(TEMPLATE))
        async with ControlPlane(tmp_path, "plane", config) as plane:
            (node,) = await nomad.request("GET", "/v1/nodes")
            path, name = f"/v1/node/{node['ID']}", node["Name"]

            async def kinds() -> list[str]:
                found = (await plane.call("GET", "/v1/events?kind=node."))["items"]
                assert all(event["data"] == {"node": name} for event in found)
                return [event["kind"] for event in found]

            async def closed(state: str) -> dict[str, Any]:
                def shows(status: dict[str, Any]) -> bool:
                    return any(one["state"].startswith(state) for one in status["closed_nodes"])

                status = await plane.until("/v1/status", shows)
                (found,) = status["closed_nodes"]
                return dict(found)

            async def opened() -> None:
                await plane.until("/v1/status", lambda status: not status["closed_nodes"])

            await plane.register("pump")
            await plane.until(
                "/v1/devices/pump", lambda one: one["placement_state"] == "running", 60.0
            )
            assert (await plane.call("GET", "/v1/status"))["closed_nodes"] == []

            drain = {"Deadline": 3600 * 10**9, "IgnoreSystemJobs": True}
            await nomad.request("POST", f"{path}/drain", {"DrainSpec": drain})
            found = await closed("draining until ")
            assert (found["node"], found["agents"]) == (name, 1)
            why = "no other node takes agents"
            await plane.until(
                "/v1/status", lambda status: status["closed_nodes"][0].get("waits") == why
            )
            explained = await plane.call("GET", "/v1/devices/pump/explain")
            assert explained["next"] == f"replace: node {name} is {found['state']}; waits: {why}"
            begun, waits = (await plane.call("GET", "/v1/events?kind=node."))["items"]
            assert begun["text"] == (
                f"node {name} is {found['state']}: no new agent is placed on it, 1 agent is there"
            )
            assert waits["text"] == f"no agent leaves node {name}: {why}; 1 agent is there"

            await plane.process.terminate(15.0)
            await plane.start()
            await plane.ready()
            await closed("draining until ")
            assert await kinds() == ["node.draining", "node.drain_waits"]

            await nomad.request("POST", f"{path}/drain", {"DrainSpec": None, "MarkEligible": True})
            await opened()
            explained = await plane.call("GET", "/v1/devices/pump/explain")
            assert "drained" not in explained["next"]
            assert await kinds() == ["node.draining", "node.drain_waits", "node.open"]

            eligibility = f"{path}/eligibility"
            await nomad.request("POST", eligibility, {"Eligibility": "ineligible"})
            assert (await closed("ineligible"))["agents"] == 1

            await plane.register("valve")
            why = "no node can run it: no eligible node in its datacenters and pool"
            held = f"1 agent waits for a node: {why}"
            await plane.until("/v1/status", lambda status: status["starts_held"] == held)
            waits = await plane.call("GET", "/v1/devices/valve")
            assert waits["reason"] == f"agent pending: {why}"

            await plane.process.terminate(15.0)
            await nomad.request("POST", eligibility, {"Eligibility": "eligible"})
            await plane.start()
            await plane.ready()

            async def all_told() -> bool:
                return await kinds() == [
                    "node.draining",
                    "node.drain_waits",
                    "node.open",
                    "node.ineligible",
                    "node.open",
                ]

            await eventually(all_told)
