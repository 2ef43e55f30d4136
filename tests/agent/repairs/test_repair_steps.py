"""The steps of a ladder, taken by a real agent with real programs, sockets and files."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent.config import document as config
from watchdog_agent.probes import mqtt
from watchdog_agent.repairs import mqtt as repair_mqtt
from watchdog_agent.repairs import wake_on_lan

from tests.agent.world import OK, Agent, Listener, World, document, probe, says, until

QUICK = {"cooldown_s": 0.0, "verify_s": 0.6, "timeout_s": 5.0}


async def broken(world: World, *steps: dict[str, Any], **changes: Any) -> Agent:
    """An agent with these steps whose device has answered and then failed."""
    agent = world.agent(repairs=[{**QUICK, **one} for one in steps], **changes)
    await agent.start()
    await world.peer.saw("accepted", state="ok", ready=True)
    await world.device.stop()
    return agent


async def attempt(agent: Agent, *outcomes: str) -> dict[str, Any]:
    """Wait for an attempt with one of these outcomes; the newest attempt."""
    found: dict[str, Any] = {}

    async def check() -> bool:
        attempts = (await agent.status())["repairs"]["attempts"]
        found.update(attempts[-1] if attempts else {})
        return found.get("outcome") in outcomes

    await until(check, f"attempt {outcomes}: {found}", 60.0)
    return found


async def test_http_step_that_repairs(world: World) -> None:
    """A POST names the device, and the attempt counts as recovered if the device answers afterwards."""
    asked: list[tuple[str, Any]] = []

    async def mend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
        asked.append(
            (head.split(b" HTTP")[0].decode(), json.loads(await reader.readexactly(length)))
        )
        await world.device.start()
        writer.write(b"HTTP/1.1 204 X\r\n\r\n")
        await writer.drain()

    helper = Listener(mend)
    await helper.start()
    try:
        url = f"http://127.0.0.1:{helper.port}/power/cycle"
        agent = await broken(world, {"kind": "http", "url": url, "verify_s": 10.0})
        said = await attempt(agent, "recovered")
    finally:
        await helper.stop()
    ((line, body),) = asked
    assert line == "POST /power/cycle"
    assert body["device_id"] == "pump-7"
    assert said["step"] == f"http 127.0.0.1:{helper.port}"
    told = next(r for r in world.peer.reports if r["state"] == "repairing")
    assert told["reason"].startswith("repairing: http ")


async def test_http_step_that_is_refused(world: World) -> None:
    """An answer other than 2xx makes the step fail, with the status as its reason, and the next is taken."""
    helper = Listener(says(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n"))
    await helper.start()
    try:
        url = f"http://127.0.0.1:{helper.port}/"
        agent = await broken(
            world,
            {"kind": "http", "url": url, "method": "GET"},
            {"kind": "command", "command": ["true"]},
        )
        await attempt(agent, "no help")
        attempts = (await agent.status())["repairs"]["attempts"]
    finally:
        await helper.stop()
    assert [(a["outcome"], a["step"].split()[0]) for a in attempts] == [
        ("failed", "http"),
        ("no help", "command"),
    ]
    assert attempts[0]["reason"] == "status 500"


async def test_http_step_without_trust(world: World) -> None:
    """If the CA file for https can't be read the step fails, and the agent continues."""
    url = f"https://127.0.0.1:{world.peer.port}/"
    agent = world.agent(repairs=[{**QUICK, "kind": "http", "url": url}])
    agent.extra["WATCHDOG_CA_CERT"] = "/nothing/here"
    await agent.start()
    await world.peer.saw("accepted", state="ok", ready=True)
    await world.device.stop()
    assert "ca_cert" in (await attempt(agent, "failed"))["reason"]
    assert (await agent.get("/healthz"))[0] == 200


async def test_command_step(world: World, tmp_path: Path) -> None:
    """A program gets its arguments without a shell, receives the device, and sees none of our secrets."""
    out = tmp_path / "out"
    text = "import os,sys,json;json.dump([sys.argv[2:],dict(os.environ)],open(sys.argv[1],'w'))"
    argv = [sys.executable, "-c", text, str(out), "$(id); a b", "*"]
    agent = world.agent(repairs=[{**QUICK, "kind": "command", "command": argv}])
    agent.extra["CONSUL_HTTP_TOKEN"] = "secret"
    agent.extra["LANG"] = "C.UTF-8"
    await agent.start()
    await world.peer.saw("accepted", state="ok", ready=True)
    await world.device.stop()
    await attempt(agent, "no help")
    arguments, environment = json.loads(out.read_text())
    assert arguments == ["$(id); a b", "*"]
    assert environment["DEVICE_ID"] == "pump-7"
    assert environment["DEVICE_ADDRESS"] == "127.0.0.1"
    assert environment["LANG"] == "C.UTF-8"
    assert not [name for name in environment if name.startswith(("WATCHDOG_", "CONSUL_"))]
    shown = json.dumps([await agent.status(), agent.log, world.peer.reports])
    assert "$(id)" not in shown


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["false"], "exit 1"),
        (["/nothing/here"], "can't be run: no such file or directory"),
        (["sh", "-c", "kill -9 $$"], "ended by signal 9"),
    ],
)
async def test_command_that_fails(world: World, argv: list[str], reason: str) -> None:
    """The reason of the attempt states how a program failed."""
    agent = await broken(world, {"kind": "command", "command": argv})
    assert (await attempt(agent, "failed"))["reason"] == reason


def alive(pid_file: Path) -> bool:
    """Whether the process with this PID runs and is not a zombie."""
    try:
        stat = Path(f"/proc/{int(pid_file.read_text())}/stat").read_text()
    except (OSError, ValueError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def sleeper(pid_file: Path) -> list[str]:
    """A command that starts a child, writes the child's PID, and does not end before it."""
    return ["sh", "-c", f"sleep 600 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait"]


async def test_command_that_takes_too_long_is_killed_with_its_children(
    world: World, tmp_path: Path
) -> None:
    """At its timeout the whole process group is gone, the agent has answered meanwhile, and no zombie is left."""
    pid = tmp_path / "pid"
    agent = await broken(world, {"kind": "command", "command": sleeper(pid), "timeout_s": 1.0})
    await until(pid.exists, "the command runs")
    assert alive(pid)
    assert (await agent.get("/healthz"))[0] == 200
    assert (await attempt(agent, "failed"))["reason"] == "took longer than 1 s"
    await until(lambda: not alive(pid), "its child is gone")

    def children() -> str:
        return Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text()

    await until(lambda: not children(), "reaped")


async def test_a_wedged_command_does_not_hold_up_a_signal(world: World, tmp_path: Path) -> None:
    """If a signal arrives while a command never ends, the agent kills it, records that, and is gone in 3 s."""
    pid = tmp_path / "pid"
    agent = await broken(world, {"kind": "command", "command": sleeper(pid), "timeout_s": 600.0})
    await until(pid.exists, "the command runs")
    assert await agent.signal(signal.SIGTERM) == 143
    await until(lambda: not alive(pid), "its child is gone")
    state = json.loads((agent.folder / "state.json").read_text())["state"]
    (last,) = state["repairs"]["ladder"]["attempts"]
    assert last["outcome"] == "interrupted"
    assert world.peer.last["stopping"] is True


async def test_a_step_that_ends_soon_after_a_signal_is_finished(
    world: World, tmp_path: Path
) -> None:
    """After a signal the agent waits a moment for the current step: a step that ends by then is recorded as done."""
    go, began, done = tmp_path / "go", tmp_path / "began", tmp_path / "done"
    text = f"touch {began}; while [ ! -e {go} ]; do sleep 0.02; done; touch {done}"
    agent = await broken(world, {"kind": "command", "command": ["sh", "-c", text]})
    await until(began.exists, "the command runs")
    go.touch()
    assert await agent.signal(signal.SIGTERM) == 143
    assert done.exists()
    state = json.loads((agent.folder / "state.json").read_text())["state"]
    assert [a["outcome"] for a in state["repairs"]["ladder"]["attempts"]] == ["verifying"]


async def test_unit_step(world: World, tmp_path: Path) -> None:
    """A unit is restarted with systemctl; here by a stub on PATH, as no systemd runs in tests."""
    out = tmp_path / "bin" / "out"
    out.parent.mkdir()
    stand_in = out.parent / "systemctl"
    stand_in.write_text(f'#!/bin/sh\necho "$@" > {out}.new && mv {out}.new {out}\n')
    stand_in.chmod(0o755)
    agent = world.agent(repairs=[{**QUICK, "kind": "unit", "unit": "modem@0.service"}])
    agent.extra["PATH"] = f"{out.parent}:{os.environ['PATH']}"
    await agent.start()
    await world.peer.saw("accepted", state="ok", ready=True)
    await world.device.stop()
    assert (await attempt(agent, "no help"))["step"] == "unit modem@0.service"
    assert out.read_text().split() == ["--no-ask-password", "restart", "modem@0.service"]


async def test_no_step_is_taken_behind_a_dead_gateway(world: World, tmp_path: Path) -> None:
    """While the gateway is dead the step for the device waits and gives the reason, and the one for the gateway is
    taken; when the gateway answers and the device does not, the device's own step is taken."""
    own, gateways = tmp_path / "own", tmp_path / "gateways"
    gateway = Listener(says(OK))
    gateway.host = "127.0.0.2"
    await gateway.start()
    steps = [
        {"kind": "command", "command": ["touch", str(own)]},
        {"kind": "command", "command": ["touch", str(gateways)], "even_behind_gateway": True},
    ]
    spec = {"address": gateway.host, "kind": "tcp", "port": gateway.port, "timeout_s": 0.3}
    agent = world.agent(repairs=[{**QUICK, **one} for one in steps], gateway=spec)
    try:
        await agent.start()
        await world.peer.saw("accepted", state="ok", ready=True)
        await gateway.stop()
        await world.device.stop()
        await until(gateways.exists, "the step for the gateway", 60.0)

        async def waits() -> bool:
            return "gateway" in (await agent.status())["repairs"]["blocked"]

        await until(waits, "it says why it waits", 60.0)
        await asyncio.sleep(1.0)  # time in which it could still be taken
        assert not own.exists()
        assert world.peer.last["gateway_dead"] is True
        assert not world.peer.last["repairs"]["exhausted"]
        await gateway.start()
        await until(own.exists, "the device's own step", 60.0)
    finally:
        await gateway.stop()


async def test_wake_step(world: World) -> None:
    """The magic packet reaches the configured address, with the device's address sixteen times."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.bind(("127.0.0.1", 0))
        ear.setblocking(False)
        to = f"127.0.0.1:{ear.getsockname()[1]}"
        await broken(world, {"kind": "wake", "mac": "02:00:00:aa:BB:cc", "to": to})
        packet = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ear, 4096), 15.0)
    assert packet == b"\xff" * 6 + bytes.fromhex("020000aabbcc") * 16


class Broker(Listener):
    """An MQTT broker that accepts one message; its answers can be corrupted."""

    def __init__(self) -> None:
        super().__init__(self._serve_one)
        self.connack = b"\x20\x02\x00\x00"
        self.packets: list[tuple[int, bytes]] = []

    async def _packet(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        kind = (await reader.readexactly(1))[0]
        length, shift = 0, 0
        while True:
            digit = (await reader.readexactly(1))[0]
            length += (digit & 127) << shift
            shift += 7
            if digit < 128:
                return kind, await reader.readexactly(length)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (self.connack, b"\x40\x02\x00\x01", b""):
            self.packets.append(await self._packet(reader))
            writer.write(answer)
            await writer.drain()


@pytest_asyncio.fixture
async def broker() -> AsyncIterator[Broker]:
    """A listening broker."""
    it = Broker()
    await it.start()
    yield it
    await it.stop()


async def test_mqtt_step(world: World, broker: Broker, tmp_path: Path) -> None:
    """One message with QoS 1 is published as the configured user with the password of a file, and the client
    disconnects."""
    (tmp_path / "password").write_text("s3cret\n")
    agent = await broken(
        world,
        {
            "kind": "mqtt",
            "broker": f"127.0.0.1:{broker.port}",
            "topic": "plant/7/reset",
            "payload": "x" * 200,
            "user": "agent",
            "password_file": str(tmp_path / "password"),
        },
    )
    await attempt(agent, "no help")
    (connect, hello), (publish, message), (left, _) = broker.packets
    assert (connect, publish, left) == (0x10, 0x32, 0xE0)
    assert hello[:7] == b"\x00\x04MQTT\x04"
    assert hello[7] == 0xC2
    assert hello.endswith(b"\x00\x05agent\x00\x06s3cret")
    assert message == b"\x00\x0dplant/7/reset\x00\x01" + b"x" * 200
    assert "s3cret" not in json.dumps([await agent.status(), agent.log, world.peer.reports])


async def test_mqtt_step_over_tls(world: World, tmp_path: Path) -> None:
    """Over TLS the message is published with our certificate to a broker with a trusted name; to a broker from another
    CA nothing is sent, and the step fails."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("broker.example").configure_cert(context)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    mine = authority.issue_cert("agent.example")
    for name, part in (
        ("ca", authority.cert_pem),
        ("other", trustme.CA().cert_pem),
        ("mine", mine.private_key_and_cert_chain_pem),
    ):
        part.write_to_path(str(tmp_path / name))
    broker = Broker()
    broker.tls = context
    await broker.start()
    step = {
        "kind": "mqtt",
        "broker": f"127.0.0.1:{broker.port}",
        "tls": True,
        "server_name": "broker.example",
        "client_cert": str(tmp_path / "mine"),
        "payload": "x",
    }
    try:
        agent = await broken(
            world,
            {**step, "topic": "not/said", "ca_cert": str(tmp_path / "other")},
            {**step, "topic": "plant/7/reset", "ca_cert": str(tmp_path / "ca")},
        )
        await attempt(agent, "no help")
        first, second = (await agent.status())["repairs"]["attempts"]
    finally:
        await broker.stop()
    assert (first["outcome"], second["outcome"]) == ("failed", "no help")
    assert first["reason"].startswith("the broker: TLS: ")
    assert [kind for kind, _ in broker.packets] == [0x10, 0x32, 0xE0]
    assert broker.packets[1][1] == b"\x00\x0dplant/7/reset\x00\x01x"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"\x20\x02\x00\x05", "the broker refuses: not authorised"),
        (b"\x20\x02\x00\xff", "the broker refuses: code 255"),
        (b"HTTP/1.1 400", "the broker: its answer is not MQTT"),
    ],
)
async def test_mqtt_broker_that_refuses(
    world: World, broker: Broker, answer: bytes, reason: str
) -> None:
    """The broker's refusal is the reason of the failed step."""
    broker.connack = answer
    place = f"127.0.0.1:{broker.port}"
    agent = await broken(world, {"kind": "mqtt", "broker": place, "topic": "a"})
    assert (await attempt(agent, "failed"))["reason"] == reason


@given(st.text(max_size=400).filter(lambda t: "\0" not in t), st.integers(0, 268_435_455))
def test_mqtt_lengths_are_written_as_they_are_read(payload: str, number: int) -> None:
    """A remaining length in the specification's form is read back unchanged."""
    raw = mqtt.length(number)
    assert sum((digit & 127) << 7 * place for place, digit in enumerate(raw)) == number
    assert len(raw) <= 4
    assert repair_mqtt.publish("t", payload, 4).endswith(payload.encode())


@given(st.binary(min_size=6, max_size=6))
def test_magic_packets_hold_the_address_sixteen_times(mac: bytes) -> None:
    """This holds for any address, in upper or lower case."""
    text = ":".join(f"{byte:02X}" for byte in mac)
    assert wake_on_lan.magic(text) == wake_on_lan.magic(text.lower()) == b"\xff" * 6 + mac * 16


def plugin(folder: Path, body: str) -> str:
    """Install a distribution with one plugin in a folder; return the folder, for PYTHONPATH."""
    info = folder / "mender-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mender\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[watchdog_agent.repairs]\nmend = mender:start\n")
    (folder / "mender.py").write_text(body)
    return str(folder)


@pytest.mark.parametrize(
    ("body", "outcome", "reason"),
    [
        (
            (
                "def start(loop, step, device, ended):\n"
                "    loop.later(0.01, lambda: (ended(True, device['device_id']), ended(False, 'x')))\n"
            ),
            "no help",
            "no probe answered",
        ),
        ("def start(*_): raise RuntimeError('boom')\n", "failed", "RuntimeError: boom"),
        ("1 / 0\n", "failed", "ZeroDivisionError"),
        ("def start(*a): a[3](True, 'at once')\n", "no help", "no probe answered"),
        ("def start(*a): a[3](False, 'at\\nonce')\n", "failed", "at?once"),
        ("def start(loop, *_): loop.later(0.01, lambda: 1 / 0)\n", "failed", "ZeroDivisionError"),
        ("def start(loop, *_): loop.later(0.01, exit)\n", "failed", "SystemExit"),
        (
            (
                "import socket\n"
                "def start(loop, step, device, ended):\n"
                "    near, far = socket.socketpair()\n"
                "    far.send(b'x')\n"
                "    loop.watch(near, 1, lambda mask: far.send(near.recv(1)) and near.nothing)\n"
            ),
            "failed",
            "AttributeError",
        ),
        ("def start(*_): pass\n", "failed", "took longer than 0.5 s"),
        (
            (
                "class Bad:\n    def cancel(self): raise SystemError('no')\n"
                "def start(*_): return Bad()\n"
            ),
            "failed",
            "took longer than 0.5 s",
        ),
    ],
)
async def test_plugin_steps(
    world: World, tmp_path: Path, body: str, outcome: str, reason: str
) -> None:
    """A plugin is found by its entry point and verified by the probes; a broken one is a failed step."""
    timeout_s = 0.5 if "took longer" in reason else 20.0
    step = {**QUICK, "kind": "plugin", "plugin": "mend", "timeout_s": timeout_s}
    agent = world.agent(repairs=[step])
    folder = plugin(tmp_path / "plugins", body)
    path = Path(__file__).resolve().parents[3] / "agent"
    agent.extra["PYTHONPATH"] = f"{path}:{folder}"
    await agent.start()
    await world.peer.saw("accepted", state="ok", ready=True)
    await world.device.stop()
    assert reason in (await attempt(agent, outcome))["reason"]
    assert (await agent.get("/healthz"))[0] == 200


async def test_a_plugin_that_is_not_installed(world: World) -> None:
    """An unregistered name is a failed step with a reason."""
    agent = await broken(world, {"kind": "plugin", "plugin": "nothing"})
    assert "no plugin nothing is installed" in (await attempt(agent, "failed"))["reason"]


async def test_nothing_is_done_that_can_not_be_kept_first(world: World, tmp_path: Path) -> None:
    """Without a folder for its state, or with one that cannot be written, the agent takes no step."""
    out = tmp_path / "out"
    agent = await broken(world, {"kind": "command", "command": ["touch", str(out)]})
    # a folder in place of the temporary state file
    (agent.folder / f"state.json.{agent.pid}").mkdir()
    await agent.is_in("offline", state="offline")
    await until(
        lambda: [line for line in agent.log if line["msg"] == "state can't be saved"], "it tried"
    )
    assert (await agent.status())["repairs"]["attempts"] == []
    assert not out.exists()
    (agent.folder / f"state.json.{agent.pid}").rmdir()
    await attempt(agent, "no help")
    assert out.exists()


@pytest.mark.parametrize(
    "kept",
    [
        5,
        {"at": "x", "undo": None, "ladder": {}, "standing": {}},
        {"at": 0, "undo": {"kind": "interface"}, "ladder": 5},
    ],
)
async def test_kept_repairs_of_another_shape_start_clean(world: World, kept: Any) -> None:
    """If saved repairs have an unknown form, this is logged and the ladder starts anew."""
    from watchdog_agent.runtime import state_file as state

    agent = world.agent(repairs=[{**QUICK, "kind": "command", "command": ["true"]}])
    agent.folder.mkdir()
    state.save(str(agent.folder), {"device_id": "pump-7", "was_ready": True, "repairs": kept})
    await agent.start()
    await world.peer.saw("accepted", state="ok", ready=True)
    assert [line for line in agent.log if "kept repairs can't be used" in line["msg"]]
    assert (await agent.status())["repairs"]["attempts"] == []


def checked(**step: Any) -> dict[str, Any]:
    return config.check(document(probes=[probe(80)], repairs=[step]))["repairs"][0]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"kind": "shell"}, "kind is 'shell'; allowed are interface, http, mqtt"),
        ({"kind": "interface"}, "interface: interface is None"),
        ({"kind": "interface", "interface": "a" * 16}, "name of a network interface"),
        ({"kind": "http", "url": "ftp://x"}, "must be http:// or https://"),
        ({"kind": "http", "url": "http://x", "method": "PUT"}, "allowed are POST, GET"),
        ({"kind": "unit", "unit": "--force"}, "name of a systemd unit"),
        ({"kind": "command", "command": "reboot"}, "list of 1 to 64 texts"),
        ({"kind": "command", "command": ["a\0b"]}, "list of 1 to 64 texts"),
        ({"kind": "wake", "mac": "00:11"}, "a MAC address such as"),
        ({"kind": "wake", "mac": "00:11:22:aa:bb:cc", "to": "x:0"}, "HOST or HOST:PORT"),
        (
            {"kind": "wake", "mac": "00:11:22:aa:bb:cc", "to": "x:" + "9" * 5000},
            "HOST or HOST:PORT",
        ),
        ({"kind": "wake", "mac": "00:11:22:aa:bb:cc", "to": "10.0.0.999"}, "not an IPv4 address"),
        ({"kind": "mqtt", "topic": "a", "broker": "http://b:1883"}, "repairs: broker: 'http://b'"),
        ({"kind": "mqtt", "topic": "a/#", "broker": "b"}, "without blanks, + and #"),
        ({"kind": "mqtt", "topic": "a"}, "broker: None is not HOST or HOST:PORT"),
        ({"kind": "command", "command": ["a"], "budget": 0}, "budget is 0; allowed are 1 to 1000"),
        (
            {"kind": "command", "command": ["a"], "when": "ok"},
            "allowed are suspect, degraded, offline",
        ),
        ({"kind": "command", "command": ["a"], "probe": "icmp"}, "there are http:80"),
        ({"kind": "command", "command": ["a"], "dry_run": 1}, "allowed are true and false"),
        ({"kind": "command", "command": ["a"], "tries": 65}, "allowed are 1 to 64"),
    ],
)
def test_wrong_steps_are_refused_in_words(step: dict[str, Any], words: str) -> None:
    """An invalid step ends the start with a message that says what is allowed."""
    with pytest.raises(config.ConfigError, match=re.escape(words)):
        checked(**step)


@pytest.mark.parametrize(
    ("broker", "place"),
    [
        ("b.test", ("b.test", 1883)),
        ("10.0.0.1:1884", ("10.0.0.1", 1884)),
        ("::1", ("::1", 1883)),
        ("[::1]", ("::1", 1883)),
        ("[::1]:1884", ("::1", 1884)),
        ("fe80::1%eth0", ("fe80::1%eth0", 1883)),
        ("[fe80::1%eth0]:1884", ("fe80::1%eth0", 1884)),
    ],
)
def test_a_broker_has_an_address_of_either_version(broker: str, place: tuple[str, int]) -> None:
    """The broker's address is a name or an IP address, IPv6 with or without brackets, with or without a port."""
    assert checked(kind="mqtt", topic="a", broker=broker)["broker_at"] == place


def test_the_tries_of_all_steps_are_bounded() -> None:
    """The record of an episode has at most 64 attempts, however they are distributed over the steps."""
    steps = [{"kind": "unit", "unit": name, "tries": 40} for name in ("a", "b")]
    with pytest.raises(config.ConfigError, match="more than 64"):
        config.check(document(probes=[probe(80)], repairs=steps))


def test_a_step_is_known_by_what_it_does() -> None:
    """The budget stays with a step after a new order or limit, but not with another target."""
    first = checked(kind="interface", interface="eth0")
    assert first["id"] == checked(kind="interface", interface="eth0", budget=9)["id"]
    assert first["id"] != checked(kind="interface", interface="eth1")["id"]
    with pytest.raises(config.ConfigError, match="stands there twice"):
        config.check(document(probes=[probe(80)], repairs=[first, dict(first)]))


def test_without_repairs_nothing_of_them_is_loaded() -> None:
    """An agent of a class without repairs imports no repair module."""
    import subprocess

    text = (
        "import sys, watchdog_agent.main as m\n"
        "m.configuration.check({'v': 1, 'device_id': 'a', 'slug': 'a', 'epoch': 1,"
        " 'address': '127.0.0.1', 'probes': [{'kind': 'icmp'}]})\n"
        "print([n for n in sys.modules if 'repair' in n or 'escalation' in n])"
    )
    path = str(Path(__file__).resolve().parents[3] / "agent")
    done = subprocess.run(
        [sys.executable, "-c", text], env={"PYTHONPATH": path}, capture_output=True, check=True
    )
    assert done.stdout.strip() == b"[]"


@pytest.mark.parametrize("without", ["api", "folder"])
async def test_an_agent_that_may_never_repair_tells_at_once(
    world: World, tmp_path: Path, without: str
) -> None:
    """With no control plane in its document, or no folder, an offline device is escalated at once, unrepaired."""
    calls: list[bytes] = []

    async def hook(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 X\r\n\r\n")
        await writer.drain()

    ear = Listener(hook)
    await ear.start()
    out = tmp_path / "out"
    sinks = [{"kind": "webhook", "url": f"http://127.0.0.1:{ear.port}/"}]
    agent = world.agent(
        repairs=[{**QUICK, "kind": "command", "command": ["touch", str(out)]}],
        escalate={"sinks": sinks},
        **({"api": []} if without == "api" else {}),
    )
    try:
        await agent.start()
        if without == "folder":
            await agent.stop()
            await run_without_a_folder(world, agent, calls)
        else:
            await agent.is_in("ok", state="ok", ready=True)
            await world.device.stop()
            await until(lambda: calls, "an escalation")
    finally:
        await ear.stop()
    assert not out.exists()


async def run_without_a_folder(world: World, agent: Agent, calls: list[bytes]) -> None:
    """The same agent, as a process without a folder for its state."""
    process = await asyncio.create_subprocess_exec(
        *agent.argv,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).resolve().parents[3] / "agent"),
            "WATCHDOG_CONFIG": str(agent.folder / "config.json"),
        },
        stderr=asyncio.subprocess.DEVNULL,
    )
    world.peer.reports.clear()
    try:
        await world.peer.saw("accepted", state="ok", ready=True)
        await world.device.stop()
        await until(lambda: calls, "an escalation")
    finally:
        process.terminate()
        await process.wait()
