"""The control plane as a job in the cluster that it manages, as shipped in jobs/."""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from nomad_watchdog.demo.process import free_port
from servers.binaries import find
from servers.consul import ConsulServer
from servers.nomad import NomadServer

pytestmark = pytest.mark.servers

TOKEN = "operators-s3cret-token"
VARIABLE = "/v1/var/nomad/jobs/nomad-watchdog"
CONFIG = """\
resync = "3s"
nomad {{
  address = "{nomad}"
}}
consul {{
  address = "{consul}"
}}
agent_class "default" {{
  kill_timeout = "5s"
  beat         = "1s"
  variables    = {{ python = "{python}" }}
  probe "tcp" {{
    port     = {device_port}
    interval = "1s"
    timeout  = "500ms"
  }}
}}
"""


async def until(test: Callable[[], Awaitable[Any]], timeout_s: float = 60.0) -> Any:
    async with asyncio.timeout(timeout_s):
        while not (found := await test()):
            await asyncio.sleep(0.1)
        return found


async def command(*arguments: str) -> str:
    child = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(60.0):
        said, _ = await child.communicate()
    assert child.returncode == 0, said.decode()
    return said.decode()


@pytest.mark.slow_because(
    "starts servers of its own, and waits for Consul's first check of the control plane"
)
async def test_the_shipped_job_runs_the_control_plane_which_runs_the_agents(
    tmp_path: Path, repository: Path
) -> None:
    """`nomad job run` of jobs/nomad-watchdog.nomad.hcl serves the API to clients with the token of
    the Nomad variable, and is registered in Consul. It starts an agent with its own credential for
    a device, restores a purged parent job (L2), and leaves its agents running when it is stopped
    (L3)."""
    port = free_port()
    device = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    device_port = device.sockets[0].getsockname()[1]
    program = str(Path(sys.executable).with_name("nomad-watchdog"))
    config = tmp_path / "nomad-watchdog.hcl"
    job = repository / "jobs" / "nomad-watchdog.nomad.hcl"
    async with (
        device,
        ConsulServer(tmp_path / "consul") as consul,
        NomadServer(tmp_path / "nomad", consul_addr=consul.http_addr) as nomad,
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=5.0), headers={"Authorization": f"Bearer {TOKEN}"}
        ) as session,
    ):
        items = {"api_token": TOKEN, "agent_key": "k" * 40}
        await nomad.request("PUT", VARIABLE, {"Path": VARIABLE[8:], "Items": items})
        config.write_text(
            CONFIG.format(
                nomad=nomad.http_addr,
                consul=consul.http_addr,
                python=sys.executable,
                device_port=device_port,
            )
        )
        await command(program, "--config", str(config), "--backend", "nomad", "init")
        nomad_program = str(find("nomad"))
        at = f"-address={nomad.http_addr}"
        options = [f"-var={k}={v}" for k, v in
                   {"config": config, "command": program, "port": port}.items()]  # fmt: skip
        await command(nomad_program, "job", "run", at, "-detach", *options, str(job))

        async def found() -> str:
            url = f"{consul.http_addr}/v1/health/service/nomad-watchdog?passing"
            async with session.get(url) as answer:
                entries = await answer.json()
            return entries and "http://{Address}:{Port}".format(**entries[0]["Service"])

        api = await until(found)
        assert api.endswith(f":{port}")

        async def watched(name: str) -> Any:
            async with session.get(f"{api}/v1/devices/{name}") as answer:
                shown = await answer.json()
            return shown["verdict"] == "watched" and shown

        for name in ("pump-1", "pump-2"):
            async with session.put(
                f"{api}/v1/devices/{name}", json={"address": "127.0.0.1"}
            ) as answer:
                assert answer.status == 201, await answer.text()
            shown = await until(lambda name=name: watched(name))
            await nomad.request("DELETE", "/v1/job/device-watchdog?purge=true")
        async with session.get(f"{api}/v1/agents", headers={"Authorization": "none"}) as answer:
            assert answer.status == 401
        async with session.get(f"{api}/v1/agents") as answer:
            agent = (await answer.json())["items"][-1]
        # without -detach the command fails while the job's deployment is still in progress
        await command(nomad_program, "job", "stop", at, "-detach", "-purge", "nomad-watchdog")

        async def ended() -> bool:
            try:
                async with session.get(f"{api}/v1/agents"):
                    return False
            except aiohttp.ClientError:
                return True

        await until(ended)

        async def runs() -> Any:
            # Nomad's client reports a start some tenths of a second after the agent itself has.
            found = await nomad.request("GET", f"/v1/allocation/{agent['instance']}")
            return found["ClientStatus"] != "pending" and found

        allocation = await until(runs)
        child = await nomad.request("GET", f"/v1/job/{quote(allocation['JobID'], safe='')}")

        assert "credential" in base64.b64decode(child.pop("Payload")).decode()
        assert "wda1." not in str(child)
        assert agent["slug"] == shown["slug"]
        assert (allocation["ClientStatus"], allocation["DesiredStatus"]) == ("running", "run")
