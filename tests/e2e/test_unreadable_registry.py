"""The token of a control plane that runs loses its rights on the registry in Consul, and gets them back."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.clients.consul import ConsulClient, ConsulSettings
from nomad_watchdog.registry.consul import ConsulRegistry
from servers.consul import ConsulServer
from servers.replica import ControlPlane

pytestmark = [pytest.mark.servers]

CONFIG = """\
backend  = "local"
data_dir = "{root}"
api {
  listen = "127.0.0.1:{port}"
}
registry {
  kind = "consul"
}
consul {
  address       = "CONSUL"
  agent_address = ""
}
local {
  fork = false
}
agent_class "default" {
  probe "icmp" {}
}
"""


@pytest.mark.slow_because("starts a Consul of its own, and waits until an agent is ready twice")
async def test_lost_rights_are_reported_at_once_and_stop_nothing(
    tmp_path: Path, repository: Path
) -> None:
    """When the policy of the token is emptied the status is not ready and names the policy that is needed, the log has
    one line about it, and the agent goes on; when the rights are back everything goes on as before."""
    rules = (repository / "jobs/policies/consul-reconciler.hcl").read_text()
    async with (
        ConsulServer(tmp_path / "consul", acl=True) as consul,
        aiohttp.ClientSession(consul.http_addr, headers={"X-Consul-Token": consul.token}) as http,
    ):

        async def put(path: str, **body: object) -> dict[str, Any]:
            async with http.put(path, json=body) as answer:
                assert answer.status == 200, await answer.text()
                found: dict[str, Any] = await answer.json()
                return found

        owner = ConsulClient(ConsulSettings(address=consul.http_addr, token=consul.token))
        await ConsulRegistry(client=owner).initialise()
        await owner.close()
        name, rights = f"p-{uuid.uuid4()}", consul.sessions(rules)
        policy = await put("/v1/acl/policy", Name=name, Rules=rights)
        token = (await put("/v1/acl/token", Policies=[{"Name": name}]))["SecretID"]
        config, env = CONFIG.replace("CONSUL", consul.http_addr), {"CONSUL_HTTP_TOKEN": token}
        async with ControlPlane(tmp_path, "plane", config, env=env) as plane:

            async def watched() -> str:
                device = await plane.until(
                    "/v1/devices/pump", lambda device: device["verdict"] == "watched"
                )
                return str(device["instance"])

            await plane.register("pump")
            first = await watched()
            await put(f"/v1/acl/policy/{policy['ID']}", Name=name, Rules="")
            status = await plane.until("/v1/status", lambda status: not status["ready"])
            assert "the registry can't be read" in status["reason"]
            assert 'key "nomad-watchdog/meta" { policy = "read" }' in status["reason"]
            assert await watched() == first
            await put(f"/v1/acl/policy/{policy['ID']}", Name=name, Rules=rights)
            await plane.ready()
            events = (await plane.call("GET", "/v1/events?kind=registry"))["items"]
            assert [event["kind"] for event in events] == [
                "registry.unreadable",
                "registry.readable",
            ]
            assert await watched() == first
            await plane.call("DELETE", "/v1/devices/pump")
            await plane.until("/v1/status", lambda status: not status["placements"])
            lines = [json.loads(line) for line in plane.log.read_text().splitlines()]
        said = [line["msg"] for line in lines if line["level"] in {"warning", "error"}]
        assert said.count("registry can't be read") == 1
        assert len(said) == len(set(said)), said
