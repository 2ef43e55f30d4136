"""The agent's own port: many connections, and requests that a web page can make a browser send."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import time
from pathlib import Path
from typing import Self

import pytest

from tests.agent.world import Agent, World, until
from tests.attacks.table import Attack

CROWD = 300
"""More than the maximum of open connections."""
SAID = {
    "silent": b"",
    "a request that never ends": b"GET /status HTTP/1.1\r\nX-",
    "a full buffer": b"GET /" + b"x" * 4000,
}
MAX_GROWTH_KB = 4_000
"""256 incomplete requests of 4 KiB, plus Python's overhead."""


class Crowd:
    """Connections that send something, never read, and stay open."""

    def __init__(self, port: int, said: bytes, count: int = CROWD) -> None:
        self._port, self._said, self._count = port, said, count
        self._open: list[socket.socket] = []

    def __enter__(self) -> Self:
        self.grow(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._open:
            one.close()

    def grow(self, count: int) -> None:
        for _ in range(count):
            one = socket.socket()
            self._open.append(one)
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", self._port))
            with contextlib.suppress(OSError):
                one.send(self._said)


async def port_of(agent: Agent) -> int:
    path = agent.folder / "agent.json"
    await until(path.exists, "its address")
    return int(json.loads(path.read_text())["listen"].rpartition(":")[2])


@pytest.mark.attack(
    "H12", "300 silent or slow connections on an agent's port, and more all the time"
)
@pytest.mark.parametrize("kind", SAID)
async def test_h12_health_checks_are_answered_beside_a_crowd(
    world: World, attack: Attack, kind: str
) -> None:
    """Beside 300 connections that stay open, each of 50 health checks is answered, the agent's memory stays the same,
    and it keeps reporting."""
    agent = await world.started()
    await agent.is_in("ok", was_ready=True)
    port = await port_of(agent)
    before = agent.kilobytes("VmRSS")
    times = []
    with Crowd(port, SAID[kind]) as crowd:
        reports = len(world.peer.reports)
        for _ in range(50):
            crowd.grow(2)
            began = time.perf_counter()
            assert await agent.get("/healthz") == (200, "ok\n")
            times.append(time.perf_counter() - began)
        await until(lambda: len(world.peer.reports) > reports + 2, "more reports")
        growth = agent.kilobytes("VmRSS") - before
    assert growth < MAX_GROWTH_KB
    attack.tried = CROWD
    attack.result = f"{kind}: 50 of 50 health checks answered, the slowest in {max(times) * 1000:.0f} ms, {growth} KB more memory"


async def test_without_descriptors_old_connections_make_room(world: World) -> None:
    """With a low limit of descriptors the agent closes its oldest connections, and answers the new one."""
    agent = await world.started()
    await agent.is_in("ok", was_ready=True)
    port = await port_of(agent)
    now = len(list(Path(f"/proc/{agent.pid}/fd").iterdir()))
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (now + 8, now + 8))
    with Crowd(port, b"", 20):
        for _ in range(10):
            assert (await agent.get("/healthz"))[0] == 200


async def answer(port: int, request: str) -> int:
    """The status of the answer to a request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode())
        return int((await reader.read()).split()[1])
    finally:
        writer.close()


async def test_what_a_web_page_can_make_a_browser_ask_is_refused(world: World) -> None:
    """A foreign Host name gets 421 except for health checks, and a POST with an Origin 403; requests by address or by a
    name of this host are answered."""
    agent = await world.started()
    port = await port_of(agent)
    own = os.uname().nodename
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "[x]:1",
        "a b",
        "0x7f.1",
    ):
        for path in ("/status", "/metrics", "/", "/probe"):
            assert await answer(port, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n") == 421, (
                host,
                path,
            )
        assert await answer(port, f"POST /probe HTTP/1.1\r\nhOST:{host}\r\n\r\n") == 421
        assert await answer(port, f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n") == 200
    for host in (
        f"127.0.0.1:{port}",
        "127.0.0.1",
        "[::1]:80",
        "[fe80::1%25lo]:80",
        "10.0.0.7:1",
        "localhost",
        own,
    ):
        assert await answer(port, f"GET /status HTTP/1.1\r\nHost: {host}\r\n\r\n") == 200, host
    twice = "GET /status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert await answer(port, twice) == 421
    assert await answer(port, "GET /status HTTP/1.0\r\n\r\n") == 200
    page = f"POST /probe HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://evil.example\r\n\r\n"
    assert await answer(port, page) == 403
    assert await answer(port, f"POST /probe HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n") == 202
