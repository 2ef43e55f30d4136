"""The first commands of README on a new Consul, and the same commands after Consul was wiped
(W5)."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from servers.consul import ConsulServer
from servers.replica import ControlPlane
from tests.e2e.test_program import directory
from tests.e2e.test_replicas import cli

__all__ = ["directory"]
pytestmark = [pytest.mark.servers, pytest.mark.asyncio(loop_scope="module")]

CONFIG = """\
backend  = "local"
data_dir = "{root}"
registry {
  kind = "consul"
}
local {
  directory = "DIRECTORY"
}
api {
  listen = "127.0.0.1:{port}"
}
consul {
  address       = "CONSUL"
  prefix        = "PREFIX"
  agent_address = ""
}
agent_class "default" {
  beat = "500ms"
  probe "icmp" {}
}
"""


async def registry_by_doctor(plane: ControlPlane) -> tuple[int, dict[str, Any]]:
    """The exit code of doctor, and its finding for the registry."""
    code, said = await cli(plane, "doctor", "-o", "json")
    (found,) = [one for one in json.loads(said)["checks"] if one["name"] == "registry"]
    return code, found


@pytest.mark.slow_because("starts the program a dozen times, as a user does")
async def test_readme_works_as_written_and_a_wiped_consul_is_not_a_new_one(
    tmp_path: Path, directory: Path, consul: ConsulServer
) -> None:
    """`doctor` before `init` warns with `not initialised yet` and exits 0. When Consul is wiped
    under the running control plane, status and doctor ask for `registry import` and never for
    `init`, the agent keeps running, and the import restores everything at the same epoch."""
    prefix = f"w{uuid.uuid4().hex[:8]}"
    config = CONFIG.replace("CONSUL", consul.http_addr).replace("PREFIX", prefix)
    plane = ControlPlane(tmp_path, "plane", config.replace("DIRECTORY", str(directory)))

    code, found = await registry_by_doctor(plane)
    assert (code, found["status"], found["found"]) == (0, "warn", "not initialised yet")
    assert found["fix"].startswith("for a new installation run `nomad-watchdog init`;")
    assert (await cli(plane, "init"))[0] == 0
    code, found = await registry_by_doctor(plane)
    assert (code, found["status"]) == (0, "ok")

    async with plane:
        await plane.register("pump")
        before = await plane.until(
            "/v1/devices/pump", lambda one: one["instance"] and one["placement_state"] == "running"
        )
        backup = tmp_path / "backup"
        code, said = await cli(plane, "registry", "export")
        assert code == 0
        backup.write_text(said)

        async with aiohttp.ClientSession() as http:
            url = f"{consul.http_addr}/v1/kv/{prefix}/?recurse=true"
            async with http.delete(url) as answer:
                assert answer.status == 200
        status = await plane.until("/v1/status", lambda status: not status["ready"])
        assert "registry import FILE" in status["reason"]
        code, found = await registry_by_doctor(plane)
        assert (code, found["status"]) == (69, "fail")
        assert "wiped or replaced while the control plane runs" in found["found"]
        assert found["fix"].startswith("restore the records with `nomad-watchdog registry import")
        assert "nomad-watchdog init" not in found["found"] + found["fix"]
        explained = await plane.call("GET", "/v1/devices/pump/explain")
        assert explained["next"].startswith("nothing until the registry is back; its agent goes on")

        code, said = await cli(plane, "registry", "import", str(backup))
        assert code == 0, said
        await plane.until("/v1/status", lambda status: status["ready"])
        after = await plane.call("GET", "/v1/devices/pump")
        assert (after["epoch"], after["instance"]) == (before["epoch"], before["instance"])
        await plane.call("DELETE", "/v1/devices/pump")
        await plane.until("/v1/devices/pump", lambda one: one["placement_state"] != "running")
