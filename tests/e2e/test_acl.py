"""The main job with Nomad, Consul and the API all denying by default, with the shipped policies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.demo.process import clean_environment
from servers.consul import ConsulServer
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.e2e import audit
from tests.schedulers.conftest import eventually

pytestmark = pytest.mark.servers

API_TOKEN = "not-a-secret-of-anybody"
CONFIG = """\
backend   = "nomad"
lease_ttl = "2s"
resync    = "3s"
data_dir  = "{root}"
api {
  listen     = "127.0.0.1:{port}"
  token_file = "FOLDER/api.token"
}
nomad {
  address    = "NOMAD"
  token_file = "FOLDER/nomad.token"
}
consul {
  address    = "CONSUL"
  token_file = "FOLDER/consul.token"
}
agent_class "default" {
  kill_timeout = "5s"
  beat         = "1s"
  variables = {
    python            = "PYTHON"
    consul_token_file = "FOLDER/agent.token"
  }
  probe "tcp" {
    port     = DEVICE
    interval = "1s"
    timeout  = "500ms"
  }
}
"""


def keep(path: Path, secret: str) -> None:
    path.touch(mode=0o600)
    path.write_text(f"{secret}\n")


async def nomad_token(server: NomadServer, rules: str) -> str:
    policy = {"Name": "reconciler", "Rules": rules}
    await server.request("PUT", "/v1/acl/policy/reconciler", body=policy)
    made = {"Name": "reconciler", "Type": "client", "Policies": ["reconciler"]}
    return str((await server.request("PUT", "/v1/acl/token", body=made))["SecretID"])


async def consul_token(server: ConsulServer, name: str, rules: str) -> str:
    headers = {"X-Consul-Token": server.token}
    async with aiohttp.ClientSession(server.http_addr, headers=headers) as http:
        async with http.put("/v1/acl/policy", json={"Name": name, "Rules": rules}) as answer:
            assert answer.status == 200, await answer.text()
        made = {"Description": name, "Policies": [{"Name": name}]}
        async with http.put("/v1/acl/token", json=made) as answer:
            assert answer.status == 200, await answer.text()
            return str((await answer.json())["SecretID"])


async def program(file: Path, *argv: str) -> tuple[int, str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nomad_watchdog", "--config", str(file), *argv,
        env=clean_environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(60.0):
        said, _ = await child.communicate()
    assert child.returncode is not None
    return child.returncode, said.decode()


@pytest.mark.slow_because("starts servers with ACLs, and waits for Consul's checks of two agents")
async def test_s10_the_main_job_with_every_door_shut(tmp_path: Path, repository: Path) -> None:
    """With only the permissions of the policies in jobs/, agents start, register in Consul, report,
    are replaced and leave. doctor finds no error, and no token appears in Nomad or in a log."""
    policies = repository / "jobs" / "policies"
    device = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    device_port = device.sockets[0].getsockname()[1]
    root = tmp_path / "nomad"
    async with (
        device,
        ConsulServer(tmp_path / "consul", acl=True) as consul,
        NomadServer(root, consul_addr=consul.http_addr, acl=True) as nomad,
        aiohttp.ClientSession(headers={"X-Consul-Token": consul.token}) as http,
    ):
        secrets = {
            "api": API_TOKEN,
            "nomad": await nomad_token(nomad, (policies / "nomad-reconciler.hcl").read_text()),
            "consul": await consul_token(
                consul,
                "reconciler",
                consul.sessions((policies / "consul-reconciler.hcl").read_text()),
            ),
            "agent": await consul_token(
                consul, "agent", (policies / "consul-agent.hcl").read_text()
            ),
        }
        for name, secret in secrets.items():
            keep(tmp_path / f"{name}.token", secret)
        config = CONFIG
        for word, value in {
            "NOMAD": nomad.http_addr,
            "CONSUL": consul.http_addr,
            "FOLDER": str(tmp_path),
            "PYTHON": sys.executable,
            "DEVICE": str(device_port),
        }.items():
            config = config.replace(word, value)
        plane = ControlPlane(tmp_path, "plane", config, token=API_TOKEN)
        code, said = await program(plane.file, "init")
        assert code == 0, said

        async def in_consul(name: str) -> list[Any]:
            url = f"{consul.http_addr}/v1/health/service/device-watchdog-agent?passing"
            async with http.get(url) as answer:
                entries = await answer.json()
            return [e for e in entries if e["Service"]["Meta"]["device_id"] == name]

        async with plane:
            for name in ("pump-1", "pump-2"):
                await plane.register(name)
                path = f"/v1/devices/{name}"
                await plane.until(path, lambda shown: shown["verdict"] == "watched", 60.0)
                await eventually(lambda name=name: in_consul(name), 60.0)

            (victim,) = [p for p in audit.processes(root) if p.slug.startswith("pump-1")]
            os.kill(victim.pid, signal.SIGKILL)

            def replaced() -> bool:
                now = [p.pid for p in audit.processes(root) if p.slug.startswith("pump-1")]
                return len(now) == 1 and now != [victim.pid]

            await eventually(replaced, 60.0)
            await plane.call("DELETE", "/v1/devices/pump-2")
            await eventually(
                lambda: not [p for p in audit.processes(root) if p.slug.startswith("pump-2")], 30.0
            )

            async def left_consul() -> bool:
                return not await in_consul("pump-2")

            await eventually(left_consul, 60.0)
            code, said = await program(plane.file, "doctor")
            assert code == 0, said
            jobs = await nomad.request("GET", "/v1/jobs?meta=true&prefix=device-watchdog")
            details = [
                await nomad.request("GET", f"/v1/job/{job['ID'].replace('/', '%2F')}")
                for job in jobs
            ]
            told = str(details) + plane.log.read_text() + said
            arguments = "".join(
                entry.read_bytes().decode(errors="replace")
                for process in audit.processes(root)
                if (entry := Path(f"/proc/{process.pid}/cmdline")).exists()
            )
            for name, secret in secrets.items():
                assert secret not in told + arguments, name
