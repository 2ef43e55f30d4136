"""Devices that answer incorrectly: the agent stays small and states what was wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import ssl
import sys
from pathlib import Path

import pytest
import trustme

from nomad_watchdog.demo.process import free_port
from tests.agent.receiver import Receiver
from tests.agent.world import AGENT, Listener, Speaker, World, probe, says, silent, until

MAX_KB = 24_000
"""Bare Python uses 9 to 10 MB; 50 MB of a device's answer would be noticed."""


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends one byte of an endless head every 20 ms."""
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends 50 MB of head."""
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    for _ in range(50):
        writer.write(b"y" * 1_000_000)
        await writer.drain()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Closes without sending anything."""


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
    """A device that answers incorrectly is suspect with a reason that states why, and the agent stays small."""
    world.device.speak = speak
    agent = await world.started()
    report = await world.peer.saw("suspect", state="suspect")
    assert any(one in report["reason"] for one in reason.split("|")), report["reason"]
    assert report["reason"].startswith(f"http:{world.device.port}: ")
    assert agent.kilobytes("VmHWM") < MAX_KB


async def test_a_device_that_redirects_for_ever_is_asked_once_a_probe(world: World) -> None:
    """A device that redirects every request to itself gets one request per probe, and no more."""
    paths: list[str] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        paths.append(head.split()[1].decode())
        where = f"http://127.0.0.1:{world.device.port}/{len(paths)}"
        writer.write(f"HTTP/1.1 307 X\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode())

    world.device.speak = speak
    agent = await world.started()
    await world.peer.saw("suspect", state="suspect")
    await until(lambda: len(paths) > 30, "thirty probes", 60.0)
    assert set(paths) == {"/"}
    assert (await agent.status())["probes"][f"0:http:{world.device.port}"]["reason"] == (
        "status 307, not 200"
    )
    assert agent.kilobytes("VmHWM") < MAX_KB


@pytest.mark.parametrize("expected", [{}, {"expect_body": "needle"}])
async def test_ten_gigabytes_are_not_taken(world: World, expected: dict[str, str]) -> None:
    """Of a device that sends 10 GB the agent reads a few hundred KB of each answer and hangs up, whether or not it
    checks the body."""
    sent: list[int] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
        sent.append(0)
        mine = len(sent) - 1
        try:
            for _ in range(10_000_000_000 // 65536):
                writer.write(b"y" * 65536)
                await writer.drain()
                sent[mine] += 65536
        except ConnectionError:
            pass

    world.device.speak = speak
    agent = await world.started(probes=[probe(world.device.port, **expected)])
    await until(lambda: len(sent) > 20, "twenty answers", 60.0)
    # data buffered by the kernel and asyncio was not read by the agent
    assert max(sent[:-1]) < 16_000_000
    assert agent.kilobytes("VmHWM") < MAX_KB
    if expected:
        seen = (await agent.status())["probes"].popitem()[1]
        assert "not in its first 64 KiB" in seen["reason"]


async def test_large_body_costs_no_memory(world: World) -> None:
    """A good status before 50 MB of body is a success, and the body is not read."""

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
    assert agent.kilobytes("VmHWM") < MAX_KB


async def test_many_bad_answers_cost_no_memory(world: World) -> None:
    """After a hundred floods the agent's peak memory is still that of a small process."""
    count = 0

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await flood(reader, writer)

    world.device.speak = counted
    agent = await world.started(probes=[probe(world.device.port, interval_s=0.05)])
    await until(lambda: count >= 100, "100 floods", 60.0)
    assert agent.kilobytes("VmHWM") < MAX_KB


async def test_keep_alive_device_that_ignores_close(world: World) -> None:
    """A chunked answer on a connection that stays open is a success."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        await reader.read()

    world.device.speak = speak
    agent = await world.started()
    await agent.is_in("ok", state="ok", was_ready=True)


async def test_visitors_that_stay_do_not_wedge_the_health_check(world: World) -> None:
    """With 60 connections that send nothing, /healthz answers and SIGTERM works in time."""
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
    """An API that floods the agent neither ends it nor increases its memory."""
    bad = Listener(flood)
    await bad.start()
    try:
        agent = await world.started(api=[f"http://127.0.0.1:{bad.port}"])
        await until(lambda: [x for x in agent.log if "8 KiB" in x["msg"]], "a remark")
        await agent.is_in("ok", state="ok", ready=True)
        assert agent.kilobytes("VmHWM") < MAX_KB
    finally:
        await bad.stop()


@pytest.mark.parametrize("way", ["500", "flood", "garbage", "silence"])
async def test_a_consul_that_is_ill_harms_nobody(world: World, way: str) -> None:
    """If Consul answers 500, floods, sends something else or nothing, an agent that registers there, keeps its state
    there and would elect watches and reports, is not ready (except after a 200), logs why in a few lines, escalates its
    dead device by itself, and stays small."""
    ways: dict[str, Speaker] = {
        "500": says(b"HTTP/1.1 500 X\r\nContent-Length: 12\r\n\r\nNo leader!\r\n"),
        "flood": flood,
        "garbage": says(b"HTTP/1.1 200 OK\r\n\r\n" + b'[{"Value": {}}, 7, null]'),
        "silence": silent,
    }
    consul, receiver = Listener(ways[way]), Receiver()
    await consul.start()
    await receiver.start()
    agent = world.agent(
        consul=f"http://127.0.0.1:{consul.port}",
        state="consul",
        labels={"site": "a"},
        escalate={
            "sinks": [{"kind": "webhook", "url": f"http://127.0.0.1:{receiver.port}"}],
            "consul_wait_s": 1.0,
            "gather_s": 0.3,
        },
    )
    try:
        await agent.start()
        # an answer of 200 is a registration, whatever its body is
        await world.peer.saw("a report", state="ok", ready=way == "garbage")
        await world.device.stop()
        (alert,) = await until(lambda: receiver.told("firing"), "an alert", 60.0)
        assert alert["uncoordinated"] is True
        if way != "garbage":
            words = {"500": "status 500", "flood": "8 KiB", "silence": "no answer within"}
            said = [one["msg"] for one in agent.log if one["msg"].startswith("consul: ")]
            assert words[way] in said[0]
            assert len(said) < 5
        assert (await agent.get("/healthz"))[0] == 200
        assert agent.kilobytes("VmHWM") < MAX_KB
        assert await agent.signal(signal.SIGTERM) == 143
    finally:
        await consul.stop()
        await receiver.stop()


@pytest.mark.parametrize("speak", [flood, trickle], ids=["flood", "trickle"])
async def test_receivers_that_are_ill_harm_nobody(world: World, speak: Speaker) -> None:
    """A receiver of alerts and a Loki that flood or trickle count as failed; the agent continues, and stays small."""
    bad = Listener(speak)
    await bad.start()
    url = f"http://127.0.0.1:{bad.port}"
    agent = world.agent(
        escalate={"sinks": [{"kind": "webhook", "url": url}], "retry_s": 0.1}, loki={"url": url}
    )
    try:
        await agent.start()
        await world.peer.saw("a report", state="ok", ready=True)
        await world.device.stop()
        await until(
            lambda: [one for one in agent.log if one["msg"] == "escalation is not taken"],
            "a remark",
            30.0,
        )
        status = await agent.status()
        assert status["escalations"]["sent"] == status["logs"]["shipped"] == 0
        await agent.is_in("offline", state="offline")
        assert agent.kilobytes("VmHWM") < MAX_KB
        assert await agent.signal(signal.SIGTERM) == 143
    finally:
        await bad.stop()


async def test_a_full_disk_is_said_and_no_step_is_taken_on_it(world: World, tmp_path: Path) -> None:
    """With its folder on a full disk an agent watches, reports and states what is wrong; a repair, which must be saved
    first, is not taken until there is space again."""
    disk, done = tmp_path / "disk", tmp_path / "done"
    disk.mkdir()
    fill = f"head -c 1M /dev/zero > {disk}/rubbish || true"
    mount = f"mount -t tmpfs -o size=64k none {disk} && {{ {fill}; }} 2>/dev/null"
    words = f'{mount}; exec "{sys.executable}" -m watchdog_agent'
    step = {"kind": "command", "command": ["touch", str(done)], "cooldown_s": 0.0}
    agent = world.agent(argv=["unshare", "-m", "sh", "-c", words], repairs=[step])
    listen = f"127.0.0.1:{free_port()}"
    agent.extra = {"WATCHDOG_STATE_DIR": str(disk), "WATCHDOG_LISTEN": listen}
    agent.folder.mkdir()
    # the agent's own file with its listen address is on the full disk
    starting = asyncio.create_task(agent.start())
    await until(lambda: world.peer.last, "a report")
    (agent.folder / "agent.json").write_text(json.dumps({"listen": listen}))
    await starting
    await world.peer.saw("ready", state="ok", ready=True)
    await world.device.stop()
    await world.peer.saw("offline", state="offline", timeout_s=60.0)
    await asyncio.sleep(1.0)  # time in which a step could be taken
    assert not done.exists()
    said = {one["msg"]: one.get("reason") for one in agent.log}
    assert said["state can't be saved"] == "no space left on device"
    assert said["address can't be written"] == "no space left on device"
    assert agent.kilobytes("VmHWM") < MAX_KB
    # as the agent sees it: the disk is mounted only in its namespace
    Path(f"/proc/{agent.pid}/root{disk}/rubbish").unlink()
    await until(done.exists, "the repair", 60.0)


CLOCK = """
import os, sys, time
real = time.time
def skewed():
    with open({offsets!r}) as file:
        return real() + float(file.read() or 0)
time.time = skewed
time.time_ns = lambda: int(skewed() * 1e9)
sys.path.insert(0, {agent!r})
from watchdog_agent import main
main.main()
"""
YEARS_S = 10 * 365 * 86400.0


async def test_a_clock_that_jumps_accuses_nobody_and_repeats_nothing(
    world: World, tmp_path: Path
) -> None:
    """While the wall clock jumps ten years forward, back, and before 1980, the device stays `ok`, and probes and
    reports keep their intervals; a dead device is alerted under one key and repaired within its budget, also over a
    restart with another clock."""
    offsets, count = tmp_path / "offsets", tmp_path / "count"
    offsets.write_text("0")

    def jump(seconds: float) -> None:
        (tmp_path / "new").write_text(str(seconds))
        (tmp_path / "new").rename(offsets)

    receiver = Receiver()
    await receiver.start()
    script = CLOCK.format(offsets=str(offsets), agent=str(AGENT))
    step = {"kind": "command", "command": ["sh", "-c", f"echo x >> {count}"], "budget": 1}
    agent = world.agent(
        argv=[sys.executable, "-I", "-S", "-c", script],
        repairs=[{**step, "cooldown_s": 0.0, "verify_s": 0.5}],
        escalate={"sinks": [{"kind": "webhook", "url": f"http://127.0.0.1:{receiver.port}"}]},
    )
    try:
        await agent.start()
        await world.peer.saw("ready", state="ok", ready=True)
        for seconds in (YEARS_S, -YEARS_S, -50 * YEARS_S / 10, 0.0):
            jump(seconds)
            seen, runs = len(world.peer.reports), len(world.peer.reports) + 8
            began = asyncio.get_running_loop().time()
            await until(lambda runs=runs: len(world.peer.reports) >= runs, "eight beats", 60.0)
            assert asyncio.get_running_loop().time() - began > 8 * 0.2 * 0.5
            assert {one["state"] for one in world.peer.reports[seen:]} == {"ok"}
        await world.device.stop()
        await until(lambda: receiver.told("firing"), "an alert", 60.0)
        jump(-YEARS_S)
        assert agent.process is not None
        await agent.process.kill()
        await agent.start()
        await agent.is_in("offline", state="offline")
        await asyncio.sleep(2.0)  # time in which the step could be taken again
        assert count.read_text() == "x\n"
        # after a kill between delivery and saving, it is sent twice, under one key
        assert len({one["key"] for one in receiver.told("firing")}) == 1
        assert agent.kilobytes("VmHWM") < MAX_KB
        assert await agent.signal(signal.SIGTERM) == 143
    finally:
        await receiver.stop()


async def test_a_tls_server_that_floods_costs_no_memory(world: World) -> None:
    """Endless bytes instead of a handshake, or after one, end a probe over TLS with a reason; even with the TLS library
    loaded the agent stays below 30 MB."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    inside = Listener(flood)
    inside.tls = context
    world.device.speak = flood
    quick = {"interval_s": 0.05, "timeout_s": 4.0, "misses": 3, "verify": False}
    await inside.start()
    try:
        agent = await world.started(
            probes=[
                {"kind": "tls", "port": world.device.port, **quick},
                {"kind": "mqtt", "tls": True, "port": world.device.port, **quick},
                {"kind": "https", "port": inside.port, **quick},
                {"kind": "mqtt", "tls": True, "port": inside.port, **quick},
            ]
        )
        await world.peer.saw("suspect", state="suspect", timeout_s=60.0)

        async def often() -> bool:
            probes = (await agent.status())["probes"].values()
            return min(one["stats"]["count"] for one in probes) >= 10

        await until(often, "ten of each", 60.0)
        reasons = [one["reason"] for one in (await agent.status())["probes"].values()]
        assert all("TLS" in one for one in reasons[:2]), reasons
        assert ("8 KiB" in reasons[2], reasons[3]) == (True, "its answer is not MQTT")
        assert agent.kilobytes("VmHWM") < 30_000
        await agent.stop()  # it would keep connecting: a handshake outlives its listener
    finally:
        await inside.stop()
