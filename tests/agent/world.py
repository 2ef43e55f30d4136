"""The surroundings of an agent in these tests: a device, a peer in place of the API, and the process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from nomad_watchdog.demo import listener as dev
from nomad_watchdog.demo.listener import Speaker
from nomad_watchdog.demo.process import Process, free_port
from nomad_watchdog.ids import parse_device_id, slug_of
from servers.ready import pause_s

AGENT = Path(__file__).resolve().parents[2] / "agent"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def until(check: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """The first true value of check; AssertionError with `what` after timeout_s."""
    began = time.monotonic()
    while True:
        value = check()
        if asks := asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        waited_s = time.monotonic() - began
        assert waited_s < timeout_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(pause_s(waited_s, 0.01, 0.05 if asks else 0.02))


async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Accepts, reads and never answers."""
    while await reader.read(4096):
        pass


def says(data: bytes) -> Speaker:
    """Answers every request with these bytes and closes."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()

    return speak


class Listener(dev.DeviceListener):
    """A listener on a port of 127.0.0.1, by default a free one."""

    def __init__(self, speak: Speaker, port: int = 0) -> None:
        super().__init__(speak, "127.0.0.1", port or free_port())


class Peer(Listener):
    """A replacement of the API: records reports and answers with `status`; None = never answers."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.status: int | None = 200
        self.headers = ""
        self.reports: list[dict[str, Any]] = []
        self.bearer = ""
        """The token of the last report."""
        self.refused = 0
        self.body = b"{}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.bearer = head.partition(b"Authorization: Bearer ")[2].split(b"\r\n")[0].decode()
        head = head.lower()
        assert head.startswith(b"post /v1/agents/report http/1.1")
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        report = json.loads(await reader.readexactly(length))
        if self.status is None:
            await silent(reader, writer)
            return
        if self.status == 200:
            self.reports.append(report)
        else:
            self.refused += 1
        body = self.body
        writer.write(
            f"HTTP/1.1 {self.status} X\r\n{self.headers}Content-Length: {len(body)}\r\n\r\n".encode()
        )
        writer.write(body)
        await writer.drain()

    @property
    def last(self) -> dict[str, Any]:
        return self.reports[-1] if self.reports else {}

    async def saw(self, what: str, timeout_s: float = 60.0, **wanted: Any) -> dict[str, Any]:
        """Wait until the newest report has these values."""
        return await until(
            lambda: (r := self.last) and wanted.items() <= r.items() and r,
            f"{what}; last report {self.last}",
            timeout_s,
        )


def document(device_id: str = "pump-7", **changes: Any) -> dict[str, Any]:
    """A configuration with short intervals; the `port` of the only probe must be given in `probes`."""
    return {
        "v": 1,
        "device_id": device_id,
        "slug": slug_of(parse_device_id(device_id)),
        "epoch": 3,
        "agent_class": "default",
        "version": "0.1.0",
        "spec_hash": "abc",
        "address": "127.0.0.1",
        "labels": {},
        "api": [],
        "consul": "",
        "beat_s": 0.2,
        **changes,
    }


def probe(port: int, **changes: Any) -> dict[str, Any]:
    """An HTTP probe ten times per second with a timeout of half a second."""
    return {
        "kind": "http",
        "port": port,
        "path": "/",
        "interval_s": 0.1,
        "timeout_s": 0.5,
        "misses": 3,
        **changes,
    }


def tcp(port: int, **changes: Any) -> dict[str, Any]:
    """A TCP probe, as a confirmation."""
    return {"kind": "tcp", "port": port, "timeout_s": 0.5, **changes}


class Agent:
    """One agent process with a state folder that outlives it."""

    def __init__(self, folder: Path, config: dict[str, Any], argv: list[str] | None = None) -> None:
        self.folder = folder
        self.config = config
        self.argv = argv or [sys.executable, "-P", "-m", "watchdog_agent"]
        self.extra: dict[str, str] = {}
        self.process: Process | None = None

    @property
    def log(self) -> list[dict[str, Any]]:
        text = (self.folder / "log").read_text()
        return [json.loads(line) for line in text.splitlines()]

    async def start(self) -> None:
        """Start the agent and wait until it serves requests."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        (self.folder / "agent.json").unlink(missing_ok=True)
        env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": str(AGENT),
            "WATCHDOG_CONFIG": str(self.folder / "config.json"),
            "WATCHDOG_STATE_DIR": str(self.folder),
            "WATCHDOG_LISTEN": "127.0.0.1:0",
            **self.extra,
        }
        self.process = Process.start(self.argv, log=self.folder / "log", env=env)
        await until(
            lambda: (self.folder / "agent.json").exists() or self._ended(), "agent.json", 15.0
        )

    def _ended(self) -> None:
        assert self.process is not None
        assert self.process.returncode is None, self.process.log_tail()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def get(self, path: str) -> tuple[int, str]:
        """(status, body) of a GET."""
        listen = json.loads((self.folder / "agent.json").read_text())["listen"]
        host, _, port = listen.rpartition(":")
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        return int(head.split()[1]), body.decode()

    async def status(self) -> dict[str, Any]:
        return json.loads((await self.get("/status"))[1])

    async def is_in(self, what: str, timeout_s: float = 60.0, **wanted: Any) -> dict[str, Any]:
        """Wait until /status has these values."""
        seen: dict[str, Any] = {}

        async def check() -> bool:
            seen.update(await self.status())
            return wanted.items() <= seen.items()

        await until(check, f"{what}; status {seen}", timeout_s)
        return seen

    def kilobytes(self, field: str) -> int:
        """A field of /proc/<pid>/status, such as VmRSS or VmHWM."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
        raise AssertionError(field)

    async def signal(self, number: signal.Signals, within_s: float = 30.0) -> int:
        """Send a signal; return the exit code, which must arrive within within_s."""
        assert self.process is not None
        self.process.send(number)
        return await self.process.wait(within_s)

    async def stop(self) -> None:
        if self.process is not None:
            await self.process.terminate(grace_s=4.0)


class World:
    """A device, a peer, and agents; all agents are stopped at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.device = Listener(says(OK))
        self.peer = Peer()
        self.dead_port = free_port()
        self.agents: list[Agent] = []
        self.others: list[Listener] = []
        """More servers that are stopped at the end."""

    def agent(self, *, argv: list[str] | None = None, **changes: Any) -> Agent:
        """An agent, not started, that probes the device, confirms on a dead port, and reports to the peer."""
        config = document(
            **{
                "probes": [probe(self.device.port)],
                "confirm": [tcp(self.dead_port)],
                "api": [f"http://127.0.0.1:{self.peer.port}"],
                **changes,
            }
        )
        agent = Agent(self.folder / f"agent-{len(self.agents)}", config, argv)
        self.agents.append(agent)
        return agent

    async def started(self, **changes: Any) -> Agent:
        agent = self.agent(**changes)
        await agent.start()
        return agent


@contextlib.asynccontextmanager
async def a_world(folder: Path) -> AsyncIterator[World]:
    """A world with a listening device and peer."""
    world = World(folder)
    await world.device.start()
    await world.peer.start()
    try:
        yield world
    finally:
        for agent in world.agents:
            await agent.stop()
        for one in (world.device, world.peer, *world.others):
            await one.stop()
