"""The program as an operator runs it: real processes, the local backend, signals and exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.demo.process import free_port
from tests.schedulers.conftest import directory, eventually, pids_of

__all__ = ["directory"]

CONFIG = """\
data_dir = "{root}"
api {{ listen = "127.0.0.1:{port}" }}
agent_class "default" {{
  variables = {{ command = "[\\"sleep\\", \\"600\\"]" }}
  probe "tcp" {{ port = 80 }}
}}
"""


class Program:
    """`nomad-watchdog` with one configuration file, as child processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        self.file = root / "nomad-watchdog.hcl"
        self.file.write_text(CONFIG.format(root=root, port=self.port))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("NOMAD_", "CONSUL_"))}

    async def start(self, *argv: str, **env: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "nomad_watchdog",
            "--config",
            str(self.file),
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.env | env,
        )

    async def __call__(self, *argv: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        process = await self.start(*argv)
        out, err = await asyncio.wait_for(process.communicate(), 30.0)
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def completed(self, *words: str) -> str:
        """What bash is offered for the last word."""
        line = ["nomad-watchdog", "--config", str(self.file), *words]
        env = {"COMP_WORDS": " ".join(line), "COMP_CWORD": str(len(line) - 1)}
        process = await self.start(_NOMAD_WATCHDOG_COMPLETE="bash_complete", **env)
        out, _ = await asyncio.wait_for(process.communicate(), 30.0)
        return out.decode()

    async def json(self, *argv: str) -> Any:
        code, out, err = await self(*argv, "-o", "json")
        assert code == 0, err
        return json.loads(out)

    @asynccontextmanager
    async def running(self, **env: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """`run`, until the end of the block; killed if it is still running."""
        process = await self.start("run", **env)
        log = asyncio.create_task(process.stderr.read() if process.stderr else asyncio.sleep(0))
        try:
            await eventually(self.is_ready, 60.0)
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), 60.0)
            await log

    async def get(self, path: str) -> Any:
        """The API's answer. For repeated reads: starting a program takes far longer."""
        return await self.ask("GET", path)

    async def is_ready(self) -> bool:
        try:
            return bool((await self.get("/v1/status"))["ready"])
        except aiohttp.ClientError:
            return False

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One API call; the parsed answer, or None."""
        url = f"http://127.0.0.1:{self.port}{path}"
        async with aiohttp.ClientSession() as http, http.request(method, url, json=body) as answer:
            assert answer.status < 300, await answer.text()
            return await answer.json() if answer.status != 204 else None

    async def import_devices(self, *names: str) -> None:
        lines = (json.dumps({"id": name, "address": "127.0.0.1"}) for name in names)
        (self.root / "fleet.ndjson").write_text("\n".join(lines))
        code, _, err = await self("devices", "import", str(self.root / "fleet.ndjson"))
        assert code == 0, err


@pytest.fixture
def program(tmp_path: Path, directory: Path) -> Program:
    """The program; `directory` stops the agents that it leaves running."""
    return Program(tmp_path)


@pytest.mark.slow_because("each command is a process of its own")
async def test_run_keeps_agents_and_leaves_them_when_it_is_told_to_stop(
    program: Program, directory: Path
) -> None:
    """Three devices get three agents; SIGTERM ends the service with 0 and stops no agent; a new
    service finds the same agents."""
    assert (await program("status"))[0] == 69
    async with program.running() as service:
        assert (await program("status"))[0] == 0
        assert await program.completed("devices", "ls", "--class", "d") == "plain,default\n"
        await program.import_devices("a", "b", "c")
        pids = await eventually(lambda: len(found := pids_of(directory)) == 3 and found)
        service.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(service.wait(), 20.0) == 0
    assert pids_of(directory) == pids
    async with program.running():
        assert (await program.json("status"))["placements"] == 3
        plan = await program.json("plan")
        assert plan["actions"] == []
    assert pids_of(directory) == pids


@pytest.mark.slow_because("each command is a process of its own")
async def test_plan_and_apply_without_a_service(program: Program, directory: Path) -> None:
    """A saved plan is carried out once; if the registry has changed, it is rejected with 75."""
    assert (await program("init"))[0] == 0
    async with program.running() as service:
        # Devices registered while the service can't act appear in `plan` later.
        service.send_signal(signal.SIGTERM)
    await _register(program.root / "registry.db", "a", "b")
    code, out, _ = await program("plan", "-o", "json", "--detailed-exitcode")
    assert code == 2
    plan = json.loads(out)
    assert sorted(a["device"] for a in plan["actions"]) == ["a", "b"]
    assert plan["summary"].startswith("2 to start")
    file = program.root / "plan.json"
    file.write_text(out)

    code, _, err = await program("apply")
    assert (code, "--auto-approve" in err) == (64, True)
    await _register(program.root / "registry.db", "c")
    code, _, err = await program("apply", str(file), "--auto-approve")
    assert (code, "has moved" in err) == (75, True)
    assert not pids_of(directory)

    file.write_text((await program("plan", "-o", "json"))[1])
    code, out, err = await program("apply", str(file), "--auto-approve", "-o", "json")
    assert code == 0, err
    assert json.loads(out)["outcomes"] == {"ok": 3}
    await eventually(lambda: len(pids_of(directory)) == 3)
    assert (await program("plan", "--detailed-exitcode"))[0] == 0


async def _register(path: Path, *names: str) -> None:
    """Register while no service runs, as another service on the same registry would."""
    from nomad_watchdog.clock import SystemClock
    from nomad_watchdog.fleet.fleet import Fleet
    from nomad_watchdog.ids import DeviceId
    from nomad_watchdog.model import Device, Limits
    from nomad_watchdog.registry.sqlite import SqliteRegistry

    registry = SqliteRegistry(path=path)
    fleet = Fleet(registry, Limits(), SystemClock())
    await fleet.records.register([Device(DeviceId(name), "default", "127.0.0.1") for name in names])
    await registry.close()


@pytest.mark.slow_because("each command is a process of its own")
async def test_held_stops_wait_for_the_operators_word(program: Program, directory: Path) -> None:
    """A wiped registry stops nothing; status, explain and `stops ls` show the command to type, and
    the approval covers only the displayed stops."""
    async with program.running():
        names = [f"d{n}" for n in range(12)]
        await program.import_devices(*names)
        await eventually(lambda: len(pids_of(directory)) == 12)
        with sqlite3.connect(program.root / "registry.db") as db:
            tables = [r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
            with_slugs = [
                t for t in tables if "slug" in [r[1] for r in db.execute(f"PRAGMA table_info({t})")]
            ]
            db.execute(f"DELETE FROM {with_slugs[0]}")
        db.close()

        async def held() -> Any:
            return (await program.get("/v1/plan"))["held"]["count"] == 12

        await eventually(held, 60.0)
        found = await program.json("stops", "ls")
        assert sorted(stop["device"] for stop in found["stops"]) == sorted(names)
        code, out, _ = await program("explain", "d3")
        assert (code, f"stops confirm {found['id']}" in out) == (0, True)
        code, out, _ = await program("stops", "ls")
        assert f"stops confirm {found['id']}" in out
        assert (await program.json("status"))["breaker"]["id"] == found["id"]
        code, _, err = await program("stops", "confirm", "0" * 12)
        assert (code, found["id"] in err) == (75, True)
        assert len(pids_of(directory)) == 12

        code, out, _ = await program("stops", "confirm", found["id"])
        assert (code, out) == (0, "12 stops confirmed\n")
        code, out, _ = await program("events", "-o", "json")
        assert '"audit.confirm"' in out
        await eventually(lambda: not pids_of(directory), 60.0)


async def test_events_are_followed_until_ctrl_c(program: Program) -> None:
    """`events -f` prints events as they happen, and Ctrl-C ends it with 130."""
    async with program.running():
        follower = await program.start("events", "-f", "-o", "json")
        assert follower.stdout is not None
        await program.import_devices("cam")
        line = await asyncio.wait_for(follower.stdout.readline(), 20.0)
        assert json.loads(line)["device"] == "cam"
        follower.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(follower.wait(), 30.0) == 130
        await follower.communicate()


@pytest.mark.slow_because("each command is a process of its own")
async def test_events_survive_kill_9_and_a_follower_goes_on(program: Program) -> None:
    """The events of a killed service are kept; the next service continues with higher numbers, and
    a follower that ran all the time has each event once."""

    async def seen(device: str) -> list[dict[str, Any]]:
        code, out, err = await program("events", "-o", "json", "--device", device)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    async with program.running() as service:
        follower = await program.start("events", "-f", "-o", "json", "--kind", "present")
        assert follower.stdout is not None
        await program.import_devices("before")
        lines = [await asyncio.wait_for(follower.stdout.readline(), 20.0)]
        first = await seen("before")
        file = program.root / "events.db-wal"
        await eventually(lambda: b"before" in file.read_bytes(), 60.0)
        service.send_signal(signal.SIGKILL)
        await service.wait()
    async with program.running():
        assert (await seen("before"))[: len(first)] == first
        assert (await program.json("status"))["events"]["stored"] is True
        await program.import_devices("after")
        lines.append(await asyncio.wait_for(follower.stdout.readline(), 30.0))
        follower.send_signal(signal.SIGINT)
        rest, _ = await asyncio.wait_for(follower.communicate(), 10.0)
    told = [json.loads(line) for line in (*lines, *rest.splitlines())]
    assert [event["device"] for event in told] == ["before", "after"]
    assert told[0]["seq"] < told[1]["seq"]
    assert told[0]["id"] != told[1]["id"]


async def test_systemd_is_told_when_the_fleet_is_known_and_when_it_ends(program: Program) -> None:
    """READY=1 is sent to NOTIFY_SOCKET, and STOPPING=1 after the signal."""
    path = program.root / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(20.0)
        async with program.running(NOTIFY_SOCKET=str(path)) as service:
            assert await asyncio.to_thread(listener.recv, 100) == b"READY=1"
            service.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(service.wait(), 20.0) == 0
        assert await asyncio.to_thread(listener.recv, 100) == b"STOPPING=1"


async def test_two_services_on_one_port_say_so(program: Program) -> None:
    """The second service names the address that it cannot listen on, and exits 64."""
    async with program.running():
        code, _, err = await program("run")
    assert (code, f"cannot listen on 127.0.0.1:{program.port}" in err) == (64, True)
