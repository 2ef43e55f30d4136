"""The agent's process with its newer probes: gateways, plugins, statistics, and hostile devices."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from nomad_watchdog.demo.process import free_port
from nomad_watchdog.schedulers.agent_zipapp import build_agent
from tests.agent.probing import udp
from tests.agent.world import AGENT, Listener, World, probe, silent, tcp, until

MAX_WITH_PLUGINS_KB = 32_000
"""Finding entry points loads importlib.metadata, and with it email, zipfile and more."""
MAX_KB = 20_000
"""Maximum resident memory of an agent without TLS; bare Python uses 9 to 10 MB."""


def gateway_of(listener: Listener) -> dict[str, Any]:
    return {"address": "127.0.0.2", "kind": "tcp", "port": listener.port, "timeout_s": 0.5}


async def test_a_dead_gateway_is_the_reason_and_nothing_is_offline(world: World) -> None:
    """Behind a dead gateway the agent is unable, with the gateway's name as reason and in the report; when the gateway
    answers again the device is offline, or ok if it answers too."""
    gateway = Listener(silent)
    gateway.host = "127.0.0.2"
    await gateway.start()
    try:
        agent = await world.started(gateway=gateway_of(gateway))
        ready = await world.peer.saw("ready", state="ok", ready=True)
        assert (ready["gateway"], ready["gateway_dead"]) == ("127.0.0.2", False)
        await gateway.stop()
        await world.device.stop()
        report = await world.peer.saw("the gateway", state="unable", gateway_dead=True)
        assert report["reason"] == "gateway 127.0.0.2 does not answer"
        probed = (await agent.status())["misses"]
        await until(lambda: world.peer.last["misses"] > probed + 10, "ten more misses")
        seen = await agent.status()
        assert (seen["state"], seen["confirmed"]) == ("unable", False)
        assert seen["reason"] == "gateway 127.0.0.2 does not answer"
        assert seen["evidence"]["gateway"]["answers"] is False
        assert list(seen["evidence"]["failing"]) == list(seen["probes"])
        await gateway.start()
        report = await world.peer.saw("offline", state="offline", confirmed=True)
        assert report["gateway_dead"] is False
        await world.device.start()
        await agent.is_in("ok", state="ok")
    finally:
        await gateway.stop()


async def test_an_offline_device_stays_offline_when_its_gateway_dies(world: World) -> None:
    """An offline state confirmed while the gateway answered is kept when the gateway dies later."""
    gateway = Listener(silent)
    gateway.host = "127.0.0.2"
    await gateway.start()
    try:
        agent = await world.started(gateway=gateway_of(gateway))
        await agent.is_in("ok", was_ready=True)
        await world.device.stop()
        await agent.is_in("offline", state="offline")
        await gateway.stop()
        misses = (await agent.status())["misses"]
        seen = await until_misses(agent, misses + 5)
        assert seen["state"] == "offline"
    finally:
        await gateway.stop()


async def until_misses(agent: Any, misses: int) -> dict[str, Any]:
    """The status after this number of consecutive misses."""
    seen: dict[str, Any] = {}

    async def check() -> bool:
        seen.update(await agent.status())
        return seen["misses"] >= misses

    await until(check, f"{misses} misses")
    return seen


async def test_the_label_of_a_device_names_its_gateway(world: World) -> None:
    """The label `gateway` overrides the class's address; a name that is not a numeric address is ignored, and a gateway
    that is watched itself has no gateway."""
    agent = await world.started(
        labels={"gateway": "127.0.0.9"}, gateway={"address": "127.0.0.8", "kind": "tcp", "port": 9}
    )
    await agent.is_in("ok", was_ready=True)
    assert (await agent.status())["evidence"]["gateway"]["address"] == "127.0.0.9"
    for label in ("gw-north", "<b> \u202e", "127.0.0.1", "\0"):
        other = await world.started(labels={"gateway": label})
        assert "gateway" not in (await other.status())["evidence"], label


async def test_statistics_are_shown(world: World) -> None:
    """Loss and latency of the last results are in /status and in /metrics."""
    agent = await world.started()
    await until(lambda: world.peer.last, "a report")
    await world.device.stop()
    await agent.is_in("offline", state="offline")
    (shown,) = (await agent.status())["probes"].values()
    stats = shown["stats"]
    assert 0 < stats["loss"] < 1
    assert 0 < stats["min_s"] <= stats["p50_s"] <= stats["p95_s"] <= stats["max_s"]
    text = (await agent.get("/metrics"))[1]
    name = f'probe="0:http:{world.device.port}"'
    assert f"watchdog_agent_probe_loss{{{name}}} 0." in text
    assert f'watchdog_agent_probe_latency_seconds{{{name},stat="p95"}} 0.' in text


async def test_a_suspected_device_is_asked_more_often(world: World) -> None:
    """While suspect the device is probed four times as often, and after its recovery as before."""
    times: list[float] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        times.append(time.monotonic())
        writer.write(b"HTTP/1.1 500 X\r\n\r\n")

    world.device.speak = note
    agent = await world.started(
        probes=[probe(world.device.port, interval_s=2.0, min_interval_s=0.1, misses=1)]
    )
    await agent.is_in("suspect", state="suspect")

    def gaps() -> list[float]:
        return [later - earlier for earlier, later in pairwise(times)]

    # a busy machine stretches single gaps: with more probes one has the expected length
    await until(lambda: len(times) >= 6 and min(gaps()) < 1.0, "a gap of half a second", 60.0)


async def test_the_quick_pace_accuses_no_sooner(world: World) -> None:
    """At the quick pace too the two confirmations that make a device offline are an interval apart (S6)."""
    began: list[float] = []

    def note() -> str:
        state = world.peer.last.get("state", "")
        if len(began) < 1 and state == "suspect":
            began.append(time.monotonic())
        return state

    agent = await world.started(
        probes=[probe(world.device.port, interval_s=2.0, min_interval_s=0.1, jitter=0.0, misses=1)]
    )
    await agent.is_in("ok", was_ready=True)
    await until(lambda: world.peer.last, "a report")
    await world.device.stop()
    await until(lambda: note() == "offline", "offline", 60.0)
    assert time.monotonic() - began[0] > 1.5
    assert world.peer.last["misses"] >= 3


PLUGINS = """
import os, socket, selectors
def well(loop, settings, address, timeout_s, ended):
    loop.later(0.01, lambda: ended(True, f"{address} {settings['unit']}"))
def breaks(loop, settings, address, timeout_s, ended):
    raise RuntimeError("at once")
def breaks_later(loop, settings, address, timeout_s, ended):
    loop.later(0.01, lambda: 1 / 0)
def leaves(loop, settings, address, timeout_s, ended):
    loop.later(0.01, lambda: exit(3))
def silent(loop, settings, address, timeout_s, ended):
    pass
def talks(loop, settings, address, timeout_s, ended):
    for _ in range(3):
        ended(True, "\\x1b[1m" + "x" * 5000)
"""


def install(folder: Path) -> None:
    """Plugins as an installed distribution has them."""
    (folder / "plugs.py").write_text(PLUGINS)
    info = folder / "plugs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugs\nVersion: 1\n")
    names = ("well", "breaks", "breaks_later", "leaves", "silent", "talks")
    lines = "".join(f"{name} = plugs:{name}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[watchdog_agent.probes]\n{lines}gone = nosuch:x\n")


async def test_plugins_good_and_broken(world: World, tmp_path: Path) -> None:
    """A plugin's result counts; one that raises, exits, is silent or missing gives a reason and no success, and the
    agent continues."""
    (tmp_path / "site").mkdir()
    install(tmp_path / "site")
    names = ("well", "breaks", "breaks_later", "leaves", "silent", "talks", "gone", "other")
    agent = world.agent(
        probes=[
            {
                "kind": "plugin",
                "plugin": name,
                "settings": {"unit": "7"},
                "interval_s": 0.2,
                "timeout_s": 0.5 if name == "silent" else 30.0,
            }
            for name in names
        ]
    )
    agent.extra["PYTHONPATH"] = os.pathsep.join((str(AGENT), str(tmp_path / "site")))
    await agent.start()
    await until(lambda: world.peer.last, "a report")
    seen = {n.split(":", 2)[2]: r for n, r in (await agent.status())["probes"].items()}
    assert (seen["well"]["ok"], seen["well"]["reason"]) == (True, "127.0.0.1 7")
    assert seen["breaks"]["reason"] == "the plugin failed: RuntimeError: at once"
    assert "ZeroDivisionError" in seen["breaks_later"]["reason"]
    assert "SystemExit" in seen["leaves"]["reason"]
    assert seen["silent"]["reason"] == "the plugin gave no answer within 0.5 s"
    assert seen["talks"]["ok"]
    assert len(seen["talks"]["reason"]) <= 200
    assert "ModuleNotFoundError" in seen["gone"]["reason"]
    assert "installed: breaks, breaks_later" in seen["other"]["reason"]
    assert sorted(n for n, r in seen.items() if r["ok"]) == ["talks", "well"]
    assert agent.kilobytes("VmHWM") < MAX_WITH_PLUGINS_KB
    assert await agent.signal(signal.SIGTERM) == 143


async def test_a_light_agent_finds_plugins_that_are_installed(world: World, tmp_path: Path) -> None:
    """With -I -S an agent does not read the installed packages; one with a plugin does, and finds it in the virtual
    environment of its Python."""
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")
    )
    assert await made.wait() == 0
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    install(packages)
    build_agent(tmp_path / "agent.pyz")
    python = str(tmp_path / "venv" / "bin" / "python")
    agent = await world.started(
        argv=[python, "-I", "-S", str(tmp_path / "agent.pyz")],
        probes=[{"kind": "plugin", "plugin": "well", "settings": {"unit": "7"}}],
    )
    await agent.is_in("ok", state="ok", was_ready=True)
    (seen,) = (await agent.status())["probes"].values()
    assert seen["reason"] == "127.0.0.1 7"


async def test_a_signal_ends_the_command_at_hand(world: World, tmp_path: Path) -> None:
    """If SIGTERM arrives while a probe's command hangs, the agent ends in time, and its command with it."""
    argv = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 600"]
    agent = await world.started(
        probes=[{"kind": "command", "command": argv, "interval_s": 300.0, "timeout_s": 200.0}]
    )
    await until((tmp_path / "pid").exists, "the command runs")
    pid = int(await until((tmp_path / "pid").read_text, "its pid"))
    assert await agent.signal(signal.SIGTERM) == 143

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    await until(gone, "the command is gone")


async def test_what_is_not_configured_is_not_loaded(world: World) -> None:
    """An agent with plain probes has loaded none of the modules of the other kinds, nor ssl."""
    script = f"""
import os, sys
sys.path.insert(0, {str(AGENT)!r})
from watchdog_agent import main
def leave(code):
    with open({str(world.folder / "modules")!r}, "w") as file:
        file.write(" ".join(sys.modules))
    sys.exit(code)
os._exit = leave
main.main()
"""
    agent = await world.started(argv=[sys.executable, "-I", "-S", "-c", script])
    await agent.is_in("ok", state="ok", was_ready=True)
    await agent.signal(signal.SIGTERM)
    loaded = set((world.folder / "modules").read_text().split())
    probes = {name for name in loaded if name.startswith("watchdog_agent.probes")}
    assert probes == {"watchdog_agent.probes", "watchdog_agent.probes.builtin"}
    heavy = {"ssl", "importlib.metadata", "subprocess", "random", "typing", "datetime"}
    heavy |= {"socket", "selectors", "signal", "json", "re", "enum", "functools", "struct"}
    assert not heavy & loaded


async def test_hostile_peers_cost_no_memory(world: World, tmp_path: Path) -> None:
    """After dozens of bad answers of every kind at once the agent's peak is below 20 MB, it answers, and it states what
    is wrong with each."""
    count = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        await reader.read(4096)
        count += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
        for _ in range(50):
            writer.write(b"y" * 1_000_000)
            await writer.drain()

    world.device.speak = flood
    log = tmp_path / "log"
    log.write_text("")
    quick = {"interval_s": 0.05, "timeout_s": 0.5, "misses": 3}
    async with (
        udp(
            lambda data: data[:2] + b"\x81\x80\x00\x01\xff\xff" + data[8:] + b"\xc0\x0c" * 900
        ) as dns,
        udp(lambda data: b"\x30\x83\xff\xff\xff" + b"\x30" * 1200) as snmp,
    ):
        agent = await world.started(
            probes=[
                {**probe(world.device.port), **quick, "expect_body": "never"},
                {"kind": "mqtt", "port": world.device.port, **quick},
                {"kind": "dns", "port": dns, "name": "pump.example", **quick},
                {"kind": "snmp", "port": snmp, **quick},
                {"kind": "command", "command": ["yes"], **quick},
                {"kind": "file", "file": str(log), "forbid_text": "ERROR", **quick},
            ],
            confirm=[tcp(free_port())],
        )
        for _ in range(20):
            with log.open("a") as file:
                file.write("ERROR" * 200_000)
            wanted = count + 3
            await until(lambda wanted=wanted: count >= wanted, "more floods", 60.0)
        assert await agent.get("/healthz") == (200, "ok\n")
        seen = {r["reason"] for r in (await agent.status())["probes"].values() if not r["ok"]}
        assert agent.kilobytes("VmHWM") < MAX_KB
    text = "\n".join(seen)
    for words in ("first 64 KiB", "not MQTT", "not DNS", "not SNMP", "1 MiB|not finished"):
        assert any(one in text for one in words.split("|")), text
    assert await agent.signal(signal.SIGTERM) == 143
