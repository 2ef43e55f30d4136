"""The token of a running control plane loses its permissions for the registry in Consul, and gets
them back."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.cli.main import _code
from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
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
    """When the policy of the token is emptied, the status is not ready and names the required
    policy, the log has one line about it, and the agent keeps running. Once the permissions are
    back, everything continues as before."""
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

        owner = ConsulClient(ConsulAccess(address=consul.http_addr, token=consul.token))
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


@pytest.mark.slow_because(
    "starts a Consul of its own, which goes by a deleted token for up to 30 s"
)
async def test_a_registry_that_may_only_be_read_and_a_deleted_token_are_reported(
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With read access only, the status is not ready and names the missing policy, the metric is 1,
    the log has one line, and a change exits 77. With a deleted token every command exits 77, each
    message says that Consul does not know the token and none mentions permissions, and no replica
    is named as the holder."""
    rules = (repository / "jobs/policies/consul-reconciler.hcl").read_text()
    key = 'key_prefix "nomad-watchdog/" {\n  policy = "{}"'
    async with (
        ConsulServer(tmp_path / "consul", acl=True) as consul,
        aiohttp.ClientSession(consul.http_addr, headers={"X-Consul-Token": consul.token}) as http,
    ):

        async def ask(method: str, path: str, **body: object) -> Any:
            async with http.request(method, path, json=body) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.json()

        owner = ConsulClient(ConsulAccess(address=consul.http_addr, token=consul.token))
        await ConsulRegistry(client=owner).initialise()
        await owner.close()
        name, rights = f"p-{uuid.uuid4()}", consul.sessions(rules)
        lacking = rights.replace(key.replace("{}", "write"), key.replace("{}", "read"))
        assert lacking != rights
        policy = await ask("PUT", "/v1/acl/policy", Name=name, Rules=rights)
        token = await ask("PUT", "/v1/acl/token", Policies=[{"Name": name}])
        config = 'lease_ttl = "2s"\n' + CONFIG.replace("CONSUL", consul.http_addr)
        env = {"CONSUL_HTTP_TOKEN": token["SecretID"]}
        async with ControlPlane(tmp_path, "plane", config, env=env) as plane:
            monkeypatch.setenv("NOMAD_WATCHDOG_ADDR", plane.api)
            monkeypatch.setenv("NOMAD_WATCHDOG_CONFIG", str(plane.file))
            monkeypatch.setenv("CONSUL_HTTP_TOKEN", token["SecretID"])

            async def says(*argv: str) -> tuple[int, str]:
                capsys.readouterr()
                code = await asyncio.to_thread(_code, argv)
                return code, "".join(capsys.readouterr())

            async def metric() -> str:
                async with http.get(f"{plane.api}/metrics") as answer:
                    found = [
                        line
                        for line in (await answer.text()).splitlines()
                        if line.startswith("nomad_watchdog_registry_unwritable ")
                    ]
                return found[0].split()[1]

            await plane.register("pump")
            assert await metric() == "0.0"
            assert (await says("doctor"))[1].count("not visible to this token") == 1
            await ask("PUT", f"/v1/acl/policy/{policy['ID']}", Name=name, Rules=lacking)
            status = await plane.until("/v1/status", lambda status: not status["ready"])
            assert "can be read and not written" in status["reason"]
            assert 'key_prefix "nomad-watchdog/" { policy = "write" }' in status["reason"]
            assert await metric() == "1.0"
            for argv in (["devices", "add", "lamp", "--address", "::1"], ["devices", "rm", "pump"]):
                code, told = await says(*argv)
                assert (code, 'policy = "write"' in told) == (77, True), told
            assert (await says("devices", "get", "pump"))[0] == 0

            await ask("PUT", f"/v1/acl/policy/{policy['ID']}", Name=name, Rules=rights)
            await plane.ready()
            assert (await says("devices", "add", "lamp", "--address", "::1"))[0] == 0
            kinds = [
                one["kind"]
                for one in (await plane.call("GET", "/v1/events?kind=registry"))["items"]
            ]
            assert kinds == ["registry.unwritable", "registry.writable"]
            await plane.until("/v1/leases", lambda leases: leases["shards"][0]["holder"])

            await ask("DELETE", f"/v1/acl/token/{token['AccessorID']}")
            leases = await plane.until(
                "/v1/leases", lambda leases: not leases["shards"][0]["holder"], 60.0
            )
            assert leases["shards"][0]["last_known"] == leases["replica"]
            code, told = await says("leader")
            assert f"unknown; last known: {leases['replica']}" in told
            assert "Consul does not know this token" in told
            for argv in (
                ["maintenance", "ls"],
                ["migrate", "status"],
                ["plan"],
                ["apply", "--auto-approve"],
                ["devices", "add", "door", "--address", "::1"],
            ):
                code, told = await says(*argv)
                assert code == 77, (argv, told)
                assert "check consul.token_file (or CONSUL_HTTP_TOKEN)" in told, argv
                assert "policy =" not in told, argv
            code, told = await says("doctor", "-o", "json")
            checks = {one["name"]: one for one in json.loads(told)["checks"]}
            for one in (checks["consul token"], checks["registry"]):
                assert one["status"] == "fail"
                assert "Consul does not know this token" in one["found"]
                assert one["fix"] == "check consul.token_file (or CONSUL_HTTP_TOKEN)"
            assert "consul kv" not in checks
            lines = [json.loads(line) for line in plane.log.read_text().splitlines()]
        said = [line["msg"] for line in lines if line["level"] in {"warning", "error"}]
        assert said.count("registry can't be written") == 1
