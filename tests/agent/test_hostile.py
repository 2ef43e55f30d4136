"""Devices that answer badly: the agent stays small and says in words what was wrong."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import pytest

from tests.agent.world import Listener, Speaker, World, probe, says, until

MOST_KB = 24_000
"""Bare Python has 9 to 10 MB; 50 MB of a device's answer would be seen."""


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One byte of an endless head every 20 ms."""
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """50 MB of head."""
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(50):
        writer.write(b"y" * 1_000_000)
        await writer.drain()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Nothing but an end."""


@pytest.mark.parametrize(
    ("speak", "reason"),
    [
        (says(b"\x00\xff" * 50), "not HTTP"),
        (says(b"SSH-2.0-OpenSSH_9.6\r\n"), "not HTTP"),
        (says(b"HTTP/1.1 abc\r\n\r\n"), "not HTTP"),
        (says(b"HTTP/9\r\n\r\n"), "not HTTP"),
        (trickle, "no answer within 0.5 s"),
        (flood, "more than 8 KiB"),
        (hang_up, "closed the connection|connection reset"),
        (
            says(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"),
            "status 302, not 200",
        ),
        (says(b"HTTP/1.1 503 Busy\r\nContent-Length: 99999999999999999999\r\n\r\n"), "status 503"),
    ],
    ids=["binary", "ssh", "no-status", "cut", "trickle", "flood", "hang-up", "redirect", "length"],
)
async def test_reason_in_words(world: World, speak: Speaker, reason: str) -> None:
    """A device that does not answer as it should is suspected with a reason that names why."""
    world.device.speak = speak
    await world.started()
    report = await world.peer.saw("suspect", state="suspect")
    assert any(one in report["reason"] for one in reason.split("|")), report["reason"]
    assert report["reason"].startswith(f"http:{world.device.port}: ")


async def test_large_body_costs_no_memory(world: World) -> None:
    """A good status before 50 MB of body is an answer, and the body is not taken."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n")
        for _ in range(50):
            writer.write(b"y" * 1_000_000)
            await writer.drain()

    world.device.speak = speak
    agent = await world.started()
    await agent.is_in("ok", state="ok", was_ready=True)
    await until(lambda: agent.log, "a log")
    assert agent.kilobytes("VmHWM") < MOST_KB


async def test_many_bad_answers_cost_no_memory(world: World) -> None:
    """After a hundred floods the agent's peak is still that of a small process."""
    count = 0

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await flood(reader, writer)

    world.device.speak = counted
    agent = await world.started(probes=[probe(world.device.port, interval_s=0.05)])
    await until(lambda: count >= 100, "100 floods", 60.0)
    assert agent.kilobytes("VmHWM") < MOST_KB


async def test_keep_alive_device_that_ignores_close(world: World) -> None:
    """A device that answers in chunks and keeps the connection open has answered."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        await reader.read()

    world.device.speak = speak
    agent = await world.started()
    await agent.is_in("ok", state="ok", was_ready=True)


async def test_visitors_that_stay_do_not_wedge_the_health_check(world: World) -> None:
    """With 60 visitors that connect and say nothing, /healthz answers and SIGTERM works in time."""
    agent = await world.started()
    await agent.is_in("ok", was_ready=True)
    host, _, port = (await world.peer.saw("a report", ready=True))["listen"].rpartition(":")
    writers = []
    try:
        for _ in range(60):
            writers.append((await asyncio.open_connection(host, int(port)))[1])
        assert await agent.get("/healthz") == (200, "ok\n")
        writers[0].write(b"GET /" + b"x" * 9000)
        writers[1].write(b"\r\n\r\n")
        assert await agent.get("/healthz") == (200, "ok\n")
        assert await agent.signal(signal.SIGTERM) == 143
    finally:
        for writer in writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def test_api_that_answers_garbage_harms_nobody(world: World) -> None:
    """An API that floods the agent neither ends it nor makes it large."""
    bad = Listener(flood)
    await bad.start()
    try:
        agent = await world.started(api=[f"http://127.0.0.1:{bad.port}"])
        await until(lambda: [x for x in agent.log if "8 KiB" in x["msg"]], "a remark")
        await agent.is_in("ok", state="ok", ready=True)
        assert agent.kilobytes("VmHWM") < MOST_KB
    finally:
        await bad.stop()
