"""Unable is the third outcome: of every kind of probe, of confirmations and of gateways."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from watchdog_agent.config import probes
from watchdog_agent.config import probes as config_probes
from watchdog_agent.probes import builtin
from watchdog_agent.runtime import outcome, plugins

from nomad_watchdog.demo.process import free_port
from tests.agent.probing import asked, run
from tests.agent.world import AGENT, World, probe, tcp, until

NO_ROUTE = "255.255.255.255"
"""TCP to it has no route, and a datagram to it needs a special permission: nothing is sent."""
INVALID = "fe80::1"
"""Without a zone: EINVAL."""


def raw_only() -> bool:
    """Whether this process pings through raw sockets."""
    sock, raw = builtin.echo_socket(socket.AF_INET6)
    sock.close()
    return raw


@pytest.mark.parametrize("address", [NO_ROUTE, INVALID, "no-such..name"])
@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "tcp", "port": 9},
        {"kind": "http", "port": 9},
        {"kind": "icmp"},
        {"kind": "tls", "port": 9},
        {"kind": "dns", "name": "pump.example"},
        {"kind": "mqtt"},
        {"kind": "snmp"},
    ],
    ids=lambda spec: spec["kind"],
)
async def test_no_route_and_no_name_are_unable(address: str, spec: dict[str, Any]) -> None:
    """A probe is unable if its address has no route or is rejected by the system, or if its name does not resolve: none
    of these says anything about the device."""
    if (spec["kind"], address) == ("icmp", INVALID) and raw_only():
        address = NO_ROUTE  # a raw socket sends it over some link
    ok, reason = await asked(address, **spec)
    assert ok is None, reason
    assert reason


async def test_refusals_and_silence_are_misses(world: World) -> None:
    """What the device or the network does is a miss: a refusal, or no answer in time."""
    ok, reason = await asked(kind="tcp", port=free_port())
    assert (ok, reason) == (False, "connection refused")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        ok, reason = await asked(kind="http", port=port, timeout_s=0.2)
    assert (ok, reason) == (False, "no answer within 0.2 s")


@pytest.mark.parametrize(
    ("error", "sent", "unable"),
    [
        (OSError(113, ""), True, False),  # no host answered at the address
        (OSError(113, ""), False, True),  # a route that rejects
        (OSError(101, ""), True, True),
        (OSError(111, ""), False, False),
        (OSError(110, ""), True, False),
        (OSError(104, ""), True, False),
        (OSError(24, ""), True, True),
        (OSError(23, ""), True, True),
        (OSError(22, ""), True, True),
        (OSError(13, ""), True, True),
        (OSError(1, ""), True, True),
        (OSError(99, ""), True, True),
        (OSError(97, ""), True, True),
        (TimeoutError("x"), True, False),
        (socket.gaierror(-2, "x"), True, True),
        (UnicodeError("x"), True, True),
        (ValueError("x"), True, True),
    ],
)
def test_one_rule_for_errors(error: Exception, sent: bool, unable: bool) -> None:
    """Errors caused by others are misses, those caused by this host are not."""
    text = outcome.rated(error, "words", sent=sent)
    assert (text, isinstance(text, outcome.Unable)) == ("words", unable)


_EXHAUSTED = """
import json, os, sys
from watchdog_agent.config import probes as config_probes; from watchdog_agent.probes import builtin as probes
from watchdog_agent.runtime.loop import Loop
loop, answers = Loop(), []
specs = [{"kind": "tcp", "port": 9}, {"kind": "http", "port": 9}, {"kind": "icmp"},
         {"kind": "dns", "name": "a"}, {"kind": "snmp"}, {"kind": "mqtt"}, {"kind": "command", "command": ["true"]},
         {"kind": "mqtt", "user": "u", "password_file": "/etc/passwd"}]
specs = [config_probes.check({"timeout_s": 3.0, **spec}, "") for spec in specs]
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
def done(ok, reason, took_s, warning):
    answers.append([ok, reason])
    if len(answers) == len(specs):
        loop.stop()
for spec in specs:
    probes.start(loop, spec, "127.0.0.1", done)
loop.run()
for fd in held:
    os.close(fd)
print(json.dumps(answers))
"""


def test_without_file_descriptors_every_kind_is_unable() -> None:
    """With a real EMFILE, no kind of probe takes it for an answer of the device."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n{_EXHAUSTED}"
    env = {"PYTHONPATH": str(AGENT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=env, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    answers = json.loads(done.stdout)
    assert [ok for ok, _ in answers] == [None] * 8
    assert all("too many open files" in reason for _, reason in answers), answers


async def test_a_file_that_cannot_be_read_is_unable(tmp_path: Path) -> None:
    """Passwords, communities and certificates that cannot be read make a probe unable; once they can, it misses or
    succeeds."""
    missing = str(tmp_path / "secret")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for spec, words in (
        ({"kind": "mqtt", "user": "u", "password_file": missing}, "password_file: no such file"),
        ({"kind": "snmp", "community_file": str(loop)}, "community_file: too many levels"),
        ({"kind": "tls", "ca_cert": missing}, "ca_cert: no such file"),
        ({"kind": "https", "client_cert": missing}, "client_cert: no such file"),
        ({"kind": "file", "file": str(loop), "forbid_text": "x"}, "too many levels"),
        ({"kind": "command", "command": [missing]}, "no such file"),
        ({"kind": "command", "command": [str(tmp_path)]}, "permission denied"),
    ):
        ok, reason = await asked(port=free_port(), **spec)
        assert ok is None, (spec, reason)
        assert words in reason
    spec = config_probes.check({"kind": "tls", "ca_cert": missing, "port": free_port()}, "")
    assert run(spec)[0] is None
    Path(missing).write_text("")  # an empty file is no certificate either
    assert run(spec)[0] is None
    import trustme

    trustme.CA().cert_pem.write_to_path(missing)
    assert run(spec) == (False, "connection refused")


def raising(error: BaseException) -> Any:
    def start(_loop: Any, _settings: Any, _address: str, _timeout_s: float, _ended: Any) -> None:
        raise error

    return start


def ends(*answer: Any) -> Any:
    def start(_loop: Any, _settings: Any, _address: str, _timeout_s: float, ended: Any) -> None:
        ended(*answer)

    return start


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        (ends(True, "well"), (True, "well")),
        (ends(False, "bad"), (False, "bad")),
        (ends(0, "bad"), (False, "bad")),
        (ends(None, "no licence"), (None, "no licence")),
        (
            raising(ConnectionRefusedError(111, "refused")),
            (False, "the plugin failed: ConnectionRefusedError: [Errno 111] refused"),
        ),
        (raising(TimeoutError("late")), (False, "the plugin failed: TimeoutError: late")),
        (
            raising(PermissionError(13, "denied")),
            (None, "the plugin failed: PermissionError: [Errno 13] denied"),
        ),
        (raising(KeyError("port")), (None, "the plugin failed: KeyError: 'port'")),
        (raising(SystemExit(3)), (None, "the plugin failed: SystemExit: 3")),
    ],
)
async def test_a_plugin_that_fails_is_unable_unless_the_device_caused_it(
    start: Any, wanted: tuple[bool | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin's own error makes it unable; a refused connection is a miss."""
    monkeypatch.setattr(plugins, "load", lambda *_: start)
    assert await asked(kind="plugin", plugin="x") == wanted


async def test_a_plugin_that_is_not_installed_is_unable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing module is not a miss."""
    monkeypatch.setattr(plugins, "_missing", {})
    ok, reason = await asked(kind="plugin", plugin="no-such-plugin")
    assert ok is None
    assert "no plugin no-such-plugin is installed" in reason


# -- no permission to ping


class NoRight:
    """The socket module of a process that has no permission to ping."""

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    @staticmethod
    def socket(family: int, kind: int, proto: int = 0) -> socket.socket:
        if proto in (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6):
            raise PermissionError(1, "Operation not permitted")
        return socket.socket(family, kind, proto)


@pytest.fixture
def mute() -> Iterator[int]:
    """A port that neither accepts nor refuses connections: its queue is full."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        yield full.getsockname()[1]


async def test_without_the_right_to_ping_the_fallback_is_called_what_it_is(
    monkeypatch: pytest.MonkeyPatch, mute: int
) -> None:
    """A10: TCP in place of ICMP is named tcp, and its reason states why it was used."""
    monkeypatch.setattr(builtin, "socket", NoRight())
    spec = config_probes.check({"kind": "icmp", "timeout_s": 0.5}, "")
    assert probes.name_of(spec) == "icmp"
    ok, reason = run(spec)
    assert ok is True
    assert reason == "the host refuses, so it is there (the agent has no right to ping)"
    assert probes.name_of(spec) == "tcp:7"
    spec = config_probes.check({"kind": "icmp", "port": mute, "timeout_s": 0.5}, "")
    ok, reason = run(spec)
    assert (ok, reason) == (False, "no answer within 0.5 s (the agent has no right to ping)")
    monkeypatch.undo()
    assert run(spec)[0] is True
    assert probes.name_of(spec) == f"icmp:{mute}"


# -- the agent's process


def patched(code: str) -> list[str]:
    """An agent in which `code` has changed something."""
    return [sys.executable, "-c", f"{code}\nfrom watchdog_agent.main import main\nmain()"]


_NO_RIGHT = """
import socket as whole
from watchdog_agent.probes import builtin as probes
class NoRight:
    def __getattr__(self, name):
        return getattr(known, name)
    def socket(self, family, kind, proto=0):
        if proto == 1:
            raise PermissionError(1, "")
        return known.socket(family, kind, proto)
known, probes.socket = probes.socket, NoRight()
"""


@pytest.mark.parametrize("kind", ["tcp", "http"])
async def test_nothing_independent_left_is_unable_and_never_offline(
    world: World, mute: int, kind: str
) -> None:
    """A10: without permission to ping, a silent TCP port that no user configured is no confirmation against a device
    that is watched over TCP: unable, with the reason."""
    watched = {**probe(world.device.port), "kind": kind}
    confirm = {"kind": "icmp", "port": mute, "timeout_s": 0.2}
    agent = world.agent(argv=patched(_NO_RIGHT), probes=[watched], confirm=[confirm])
    await agent.start()
    await world.peer.saw("ok", state="ok", ready=True)
    await world.device.stop()
    report = await world.peer.saw("unable", state="unable")
    assert "no right to ping" in report["reason"]
    misses = report["misses"]
    await until(lambda: world.peer.last["misses"] > misses + 10, "ten more misses")
    assert "offline" not in [r["state"] for r in world.peer.reports]
    await world.device.start()
    await world.peer.saw("ok", state="ok")


_RESOLVER = """
import os, sys
from watchdog_agent.runtime import dial
from watchdog_agent.runtime.stdlib_light import socket
known = dial.resolve
def resolve(address):
    if address[0] == "pump.test":
        if os.path.exists({gone!r}):
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        address = ("127.0.0.1", address[1])
    return known(address)
dial.resolve = resolve
"""


async def test_a_name_that_goes_from_the_resolver_is_unable_and_never_offline(
    world: World, tmp_path: Path
) -> None:
    """V4: if the resolver fails while the device keeps answering, the state is unable with that reason, without misses
    or confirmations, as the confirmation needs the same resolver. When the name resolves again the device is ok, and
    offline only when it really is."""
    gone = tmp_path / "gone"
    agent = world.agent(argv=patched(_RESOLVER.format(gone=str(gone))), address="pump.test")
    await agent.start()
    await world.peer.saw("ok", state="ok", ready=True)
    gone.touch()
    report = await world.peer.saw("unable", state="unable")
    assert "can't resolve" in report["reason"]
    assert (report["misses"], report["confirmed"]) == (0, False)
    heard = len(world.peer.reports)
    await until(lambda: len(world.peer.reports) > heard + 5, "more reports")
    assert {r["state"] for r in world.peer.reports} <= {"ok", "suspect", "unable"}
    (shown,) = (await agent.status())["probes"].values()
    assert (shown["ok"], shown["outcome"]) == (False, "unable")
    text = (await agent.get("/metrics"))[1]
    assert 'watchdog_agent_state{state="unable"} 1' in text
    assert "watchdog_agent_probe_failures_total 0\n" in text
    gone.unlink()
    await world.peer.saw("ok", state="ok")
    await world.device.stop()
    await world.peer.saw("offline", state="offline", confirmed=True)
    # If the name of a dead device stops resolving, its state is unknown; it is offline again when it resolves.
    gone.touch()
    await world.peer.saw("unable", state="unable", confirmed=False)
    gone.unlink()
    await world.peer.saw("offline", state="offline", confirmed=True)


async def test_an_agent_that_never_could_ask_is_unable_from_its_start(world: World) -> None:
    """With an address without a route the agent is never ok, soon unable, and ready, so that the reason is reported."""
    agent = await world.started(address=NO_ROUTE)
    report = await world.peer.saw("unable", state="unable", ready=True, was_ready=False)
    assert "network is unreachable" in report["reason"]
    assert "ok" not in {r["state"] for r in world.peer.reports}
    assert (await agent.status())["misses"] == 0


async def test_a_confirmation_that_cannot_be_asked_is_unable(world: World) -> None:
    """If the device does not answer and its confirmation lacks a permission or a file, the state is unable, not
    offline."""
    confirm = {"kind": "mqtt", "port": world.dead_port, "user": "u", "password_file": "/no/such"}
    agent = await world.started(confirm=[confirm])
    await agent.is_in("ok", was_ready=True)
    await world.device.stop()
    report = await world.peer.saw("unable", state="unable", confirmed=False)
    assert "unable to confirm: mqtt" in report["reason"]
    evidence = (await agent.status())["evidence"]["confirm"][0]
    assert (evidence["ok"], evidence["unable"]) == (False, True)


async def test_of_two_confirmations_one_that_can_be_asked_is_enough(world: World) -> None:
    """If one confirmation is unable and the other fails, the device is offline by the other."""
    blind = {"kind": "mqtt", "port": world.dead_port, "user": "u", "password_file": "/no/such"}
    agent = await world.started(confirm=[blind, tcp(world.dead_port)])
    await agent.is_in("ok", was_ready=True)
    await world.device.stop()
    report = await world.peer.saw("offline", state="offline", confirmed=True)
    assert f"tcp:{world.dead_port}: connection refused" in report["reason"]


async def test_a_gateway_that_cannot_be_asked_is_not_dead(world: World) -> None:
    """Without a route to the gateway the device is neither offline nor behind a dead gateway; the agent is unable."""
    gateway = {"address": NO_ROUTE, "kind": "tcp", "port": 9, "timeout_s": 0.5}
    agent = await world.started(gateway=gateway)
    await agent.is_in("ok", was_ready=True)
    await world.device.stop()
    report = await world.peer.saw("unable", state="unable")
    assert report["gateway_dead"] is False
    assert f"gateway {NO_ROUTE}: network is unreachable" in report["reason"]
    assert "offline" not in [r["state"] for r in world.peer.reports]
