"""`agents logs` and `agents exec-probe`, on a real control plane and on a real Nomad."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.api.body import parsed
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.api.schemas import ReportIn
from nomad_watchdog.cli._agent_logs import nomad_log
from nomad_watchdog.cli._api_client import ApiClient
from nomad_watchdog.cli.main import _code
from nomad_watchdog.config.blocks import NomadSettings
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.demo.process import clean_environment, free_port
from nomad_watchdog.errors import TerminalError
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.agent.world import World, a_world, until
from tests.attacks.table import Attack
from tests.schedulers.conftest import directory, pids_of

__all__ = ["directory"]

REPORT: dict[str, Any] = {
    "v": 1,
    "device_id": "pump-7",
    "epoch": 1,
    "instance": "i",
    "sequence": 1,
    "state": "ok",
    "ready": True,
    "was_ready": True,
    "misses": 0,
    "confirmed": False,
}
CONFIG = """\
data_dir = "{root}"
api { listen = "127.0.0.1:{port}" }
local { directory = "AGENTS" }
agent_class "default" {
  beat = "1s"
  probe "tcp" {
    port     = DEVICE
    interval = "1h"
  }
  confirm "icmp" {}
}
"""


class Shell:
    """The command line, configured for one control plane."""

    def __init__(self, plane: ControlPlane) -> None:
        self.file = str(plane.file)

    async def __call__(self, *argv: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "nomad_watchdog", "--config", self.file, *argv,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=clean_environment(),
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 60.0)
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


async def watched(plane: ControlPlane, world: World, directory: Path) -> None:
    devices = {"devices": [{"id": "pump-7", "address": "127.0.0.1"}]}
    await plane.call("POST", "/v1/devices:bulk", devices)
    await plane.until("/v1/devices/pump-7", lambda it: it["verdict"] == "watched", 60.0)


@pytest.mark.slow_because("starts the command some ten times")
async def test_logs_and_probes_of_a_local_agent(tmp_path: Path, directory: Path) -> None:
    """`logs` prints the agent's lines and `exec-probe` its results: exit code 0 while the device answers, then 69,
    without a change of verdict; an unknown device is 66."""
    async with a_world(tmp_path / "world") as world:
        config = CONFIG.replace("AGENTS", str(directory))
        config = config.replace("DEVICE", str(world.device.port))
        async with ControlPlane(tmp_path, "plane", config) as plane:
            shell = Shell(plane)
            await watched(plane, world, directory)
            code, out, err = await shell("agents", "logs", "pump-7", "-n", "1000")
            assert (code, "agent started" in out) == (0, True), err
            code, out, _ = await shell("agents", "logs", "pump-7", "-n", "1", "-o", "json")
            assert (code, len(json.loads(out)["lines"])) == (0, 1)
            code, out, err = await shell("agents", "exec-probe", "pump-7", "-o", "json")
            assert (code, json.loads(out)["ok"]) == (0, True), err
            assert {one["kind"] for one in json.loads(out)["results"]} == {"tcp", "icmp"}
            await world.device.stop()

            async def failed() -> Any:
                code, out, _ = await shell("agents", "exec-probe", "pump-7")
                return code == 69 and out  # 75 if the second is not over yet

            told = await until(failed, "the failed probe", 60.0)
            assert "connection refused" in told
            assert (await plane.call("GET", "/v1/devices/pump-7"))["verdict"] == "watched"
            for verb in ("logs", "exec-probe"):
                code, _, err = await shell("agents", verb, "nobody")
                assert (code, err.startswith("error: ")) == (66, True)
            await plane.call("DELETE", "/v1/devices/pump-7")
            await until(lambda: not pids_of(directory), "its end", 60.0)


async def test_an_agent_that_is_gone_is_unavailable(tmp_path: Path, directory: Path) -> None:
    """If nothing listens at the agent's address any more, `exec-probe` exits with 69 and says so."""
    from nomad_watchdog.cli.agents import _run_probes

    port = free_port()
    with pytest.raises(TerminalError, match="no answer"):
        await asyncio.to_thread(_run_probes, ApiClient(f"http://127.0.0.1:{port}"))


def job(name: str, *, disabled: bool) -> dict[str, Any]:
    """A batch job whose only task, `agent`, prints something and keeps running."""
    task = {
        "Name": "agent",
        "Driver": "raw_exec",
        "Config": {"command": "/bin/sh", "args": ["-c", "echo a-line >&2; sleep 300"]},
        "Resources": {"CPU": 20, "MemoryMB": 20},
        "LogConfig": {"Disabled": disabled, "MaxFiles": 1, "MaxFileSizeMB": 1},
    }
    group = {"Name": "agent", "Count": 1, "Tasks": [task]}
    return {"Job": {"ID": name, "Type": "batch", "Datacenters": ["*"], "TaskGroups": [group]}}


@pytest.mark.servers
async def test_logs_of_a_nomad_agent_or_what_to_set(nomad: NomadServer) -> None:
    """The task's output is read from Nomad's client; if the job disables logs, the error says so."""
    settings = Settings(backend="nomad", nomad=NomadSettings(address=nomad.http_addr))
    found: dict[str, str] = {}
    try:
        for name, disabled in (("logs-with", False), ("logs-without", True)):
            await nomad.request("PUT", "/v1/jobs", job(name, disabled=disabled))

            async def running(name: str = name) -> str:
                listed: Any = await nomad.request("GET", f"/v1/job/{name}/allocations")
                return next((a["ID"] for a in listed if a["ClientStatus"] == "running"), "")

            found[name] = await until(running, "a running task", 60.0)

        async def said() -> bool:
            return await nomad_log(settings, found["logs-with"]) == "a-line\n"

        await until(said, "the line", 60.0)
        with pytest.raises(TerminalError, match="disabled = true"):
            await nomad_log(settings, found["logs-without"])
    finally:
        for name in found:
            await nomad.request("DELETE", f"/v1/job/{name}?purge=true")


HOSTILE = (
    "127.0.0.1:{port}/path?x=1#",
    "127.0.0.1:{port}/v1/devices",
    "user@127.0.0.1:{port}",
    "127.0.0.1:{port}#",
    "127.0.0.1:{port}?a=b",
    "evil.example/@127.0.0.1:{port}",
    "127.0.0.1:{port}\\x",
    "127.0.0.1:{port} ",
    "127.0.0.1:٣",
    "127.0.0.1:" + "9" * 5000,
    "http://127.0.0.1:{port}",
    "127.0.0.1",
)


@pytest.mark.attack(
    "H13", "an agent reports an address with a path, a user, a fragment or a scheme; `exec-probe`"
)
async def test_h13_exec_probe_posts_to_a_host_and_a_port_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], attack: Attack
) -> None:
    """Anything beyond HOST:PORT is rejected by the API in a report (400), and by the command before it connects,
    whatever the API lists; a host and a port are contacted."""
    visits: list[bytes] = []

    async def visited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.append(await reader.readline())
        writer.close()

    server = await asyncio.start_server(visited, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    def tried(listen: str) -> int:
        class Answers(ApiClient):
            def pages(self, _path: str, **_query: object) -> Iterator[dict[str, object]]:
                yield {"id": "pump-7", "instance": "a", "listen": listen}

        answers = Answers("http://127.0.0.1:1")
        monkeypatch.setattr("nomad_watchdog.cli.agents.api_of", lambda _ctx: answers)
        return _code(["agents", "exec-probe", "pump-7"])

    async with server:
        for one in HOSTILE:
            listen = one.format(port=port)
            assert await asyncio.to_thread(tried, listen) == 64, listen
            assert "is not HOST:PORT" in capsys.readouterr().err
            with pytest.raises(RequestError, match=r"HOST:PORT|at most 300"):
                parsed(json.dumps(REPORT | {"listen": listen}).encode(), ReportIn)
        assert visits == []
        assert await asyncio.to_thread(tried, f"127.0.0.1:{port}") == 69
        assert visits == [b"POST /probe HTTP/1.1\r\n"]
    for good in ("", "10.0.0.7:1", "[fd00::7]:9000", "pump.example:80", "0.0.0.0:8080"):
        assert parsed(json.dumps(REPORT | {"listen": good}).encode(), ReportIn).listen == good
    attack.tried = len(HOSTILE)
    attack.result = "the API refuses the report with 400, the command connects nowhere"
