"""Devices and servers by name and over IPv6: which addresses are tried, and what is sent to the peer."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme
from watchdog_agent.probes import builtin
from watchdog_agent.probes import snmp as probe_snmp
from watchdog_agent.repairs import wake_on_lan
from watchdog_agent.runtime import http, stdlib_light
from watchdog_agent.runtime.dial import Dial, Turns
from watchdog_agent.runtime.http import Url
from watchdog_agent.runtime.loop import Loop

from nomad_watchdog.demo.process import free_port
from tests.agent.probes.test_probe_kinds import context_of
from tests.agent.probing import asked, tcp, udp
from tests.agent.world import AGENT, OK, Speaker, World, says, until

Names = Callable[..., None]
CONNACK = b"\x20\x02\x00\x00"
LOCALHOST = "::1 localhost both.test\n127.0.0.1 localhost both.test\n"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """`names("a.test", "::1", "127.0.0.1", port=…)`: a name that resolves to these addresses, in this order."""
    known: dict[bytes, tuple[tuple[str, ...], int | None]] = {}
    real = stdlib_light.socket.getaddrinfo

    def resolve(host: Any, port: Any, *more: Any, **options: Any) -> Any:
        if host not in known:
            return real(host, port, *more, **options)
        found, fixed = known[host]
        return [one for text in found for one in real(text, fixed or port, **options)]

    def name(host: str, *found: str, port: int | None = None) -> None:
        known[host.encode()] = (found, port)

    monkeypatch.setattr(stdlib_light.socket, "getaddrinfo", resolve)
    return name


# -- A8: every address of a name


def mqtt(data: bytes) -> Speaker:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(64)
        writer.write(data)
        await reader.read()

    return speak


@pytest.mark.parametrize("first", ["::1", "127.9.9.9", "fe80::1%lo", "fe80::1"])
@pytest.mark.parametrize("kind", ["tcp", "http", "https", "tls", "mqtt"])
async def test_the_next_address_is_tried(names: Names, kind: str, first: str) -> None:
    """If the first address refuses, has no route or is unusable, each kind of probe over TCP reaches the device at its
    second."""
    authority = trustme.CA()
    tls = context_of(authority.issue_cert("both.test")) if kind in ("https", "tls") else None
    names("both.test", first, "127.0.0.1")
    more = {"ca_cert": authority.cert_pem.bytes().decode()} if tls else {}
    speak, met = mqtt(CONNACK) if kind == "mqtt" else says(OK), asyncio.Event()

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        met.set()
        await speak(reader, writer)

    async with tcp(served, tls) as port:
        found = await asked("both.test", kind=kind, port=port, timeout_s=20.0, **more)
        if kind != "tls":  # the tls probe's client is gone before its connection is served
            await asyncio.wait_for(met.wait(), 20.0)
    assert found[0], found


@pytest.mark.parametrize("first", ["::1", "fe80::1%lo"])
@pytest.mark.parametrize("kind", ["dns", "snmp"])
async def test_the_next_address_is_asked_over_udp(names: Names, kind: str, first: str) -> None:
    """Over UDP too the second address is tried if the first refuses or has no route."""
    names("both.test", first, "127.0.0.1")
    async with udp(DATAGRAMS[kind]) as port:
        more = {"name": "pump.example"} if kind == "dns" else {}
        found = await asked("both.test", kind=kind, port=port, timeout_s=20.0, **more)
    assert found[0], found


SLOW_S = 2.0


@pytest.fixture
def slow_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that takes longer than a probe's timeout, as when the first of two name servers is down."""
    real = stdlib_light.socket.getaddrinfo

    def resolve(host: Any, *more: Any, **options: Any) -> Any:
        if host == b"slow.test":
            time.sleep(1.1 * SLOW_S)
            host = b"127.0.0.1"
        return real(host, *more, **options)

    monkeypatch.setattr(stdlib_light.socket, "getaddrinfo", resolve)


@pytest.mark.usefixtures("slow_resolver")
@pytest.mark.slow_because(
    "the resolver takes longer than the timeout, which a loaded machine must keep"
)
async def test_the_time_of_a_slow_resolver_is_not_the_devices() -> None:
    """A device that answers is found, however long name resolution takes: it is neither a miss nor a slow answer."""
    mute = asyncio.Event()

    async def silent(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await mute.wait()

    async with (
        tcp(says(OK)) as web,
        tcp(mqtt(CONNACK)) as broker,
        udp(_dns) as names_at,
        udp(_snmp) as snmp,
        tcp(silent) as dead,
    ):
        specs: list[dict[str, Any]] = [
            {"kind": "tcp", "port": web},
            {"kind": "http", "port": web},
            {"kind": "mqtt", "port": broker},
            {"kind": "dns", "port": names_at, "name": "pump.example"},
            {"kind": "snmp", "port": snmp},
            {"kind": "icmp"},
            {"kind": "http", "port": dead},
        ]
        took = asyncio.create_task(asyncio.to_thread(took_s, "slow.test", web))
        *found, missed = await asyncio.gather(
            *(asked("slow.test", timeout_s=SLOW_S, **spec) for spec in specs)
        )
        mute.set()
        assert await took < SLOW_S
    assert [ok for ok, _ in found] == [True] * len(found), found
    assert missed == (False, f"no answer within {SLOW_S:g} s")


def took_s(name: str, port: int) -> float:
    """The response time that a TCP probe of this name measures, seconds."""
    loop, times = Loop(), []

    def done(ok: bool | None, reason: str, seconds: float, _warning: str) -> None:
        assert ok, reason
        times.append(seconds)
        loop.stop()

    builtin.start(loop, {"kind": "tcp", "port": port, "timeout_s": SLOW_S}, name, done)
    loop.run()
    loop.close()
    return times[0]


async def test_a_magic_packet_goes_to_every_address(names: Names) -> None:
    """The packet is sent to each address that can be reached, and the step fails only if there is none."""
    packets: list[bytes] = []
    names("both.test", "fe80::1%lo", "127.0.0.1")
    names("none.test", "fe80::1%lo")

    def wake(host: str, port: int) -> tuple[bool, str]:
        loop, found = Loop(), []

        def ended(ok: bool, reason: str) -> None:
            found.append((ok, reason))
            loop.stop()

        step = {"mac": "00:11:22:aa:bb:cc", "to_at": (host, port)}
        wake_on_lan.start(loop, step, {}, ended)
        loop.run()
        loop.close()
        return found[0]

    async with udp(packets.append) as port:
        assert wake("both.test", port) == (True, "sent")
        await until(lambda: packets, "a packet")
        ok, reason = wake("none.test", port)
    assert (ok, reason) == (False, "network is unreachable")


def _dns(data: bytes) -> bytes:
    question = data[12:]
    head = data[:2] + b"\x81\x80\0\1\0\1\0\0\0\0"
    return head + question + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\x0a\0\0\7"


def _snmp(data: bytes) -> bytes:
    message, _ = probe_snmp.read_element(data, 0, 0x30)
    _, at = probe_snmp.number(message, 0)
    _, at = probe_snmp.read_element(message, at, 4)
    pdu, _ = probe_snmp.read_element(message, at, 0xA0)
    ident, _ = probe_snmp.number(pdu, 0)
    tlv, integer = probe_snmp.tlv, probe_snmp.integer
    ticks = tlv(0x30, tlv(0x30, tlv(6, probe_snmp.UP_TIME) + b"\x43\x02\x30\x39"))
    reply = integer(ident) + integer(0) + integer(0) + ticks
    return tlv(0x30, integer(1) + tlv(4, b"public") + tlv(0xA2, reply))


DATAGRAMS: dict[str, Callable[[bytes], bytes | None]] = {"dns": _dns, "snmp": _snmp}


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port of 127.0.0.2 that neither accepts nor refuses connections: its queue is full."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.2", 0))
        server.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


@pytest.mark.parametrize("timeout_s", [0.5, 20.0])
def test_a_silent_address_does_not_use_up_the_timeout(
    names: Names, silent_port: int, timeout_s: float
) -> None:
    """While the first address is silent the second is tried, well within the timeout; both connections are closed
    afterwards."""
    with socket.create_server(("127.0.0.1", silent_port)):
        names("both.test", "127.0.0.2", "127.0.0.1")
        ok, reason = asyncio.run(
            asked("both.test", kind="tcp", port=silent_port, timeout_s=timeout_s)
        )
    assert (ok, reason) == (True, "connected")


def test_a_silent_first_address_may_still_win(names: Names, silent_port: int) -> None:
    """A silent address stays in the race: if the other refuses, the timeout is the reason."""
    names("both.test", "127.0.0.2", "127.0.0.1")
    ok, reason = asyncio.run(asked("both.test", kind="tcp", port=silent_port, timeout_s=0.5))
    assert (ok, reason) == (False, "no answer within 0.5 s")


def test_a_refusal_of_any_address_is_a_sign_that_the_host_is_there(
    names: Names, silent_port: int
) -> None:
    """If only reachability is probed, a refusal by one address counts although another is silent."""
    names("both.test", "127.0.0.2", "127.0.0.1")
    loop, found = Loop(), []

    def ended(ok: bool, reason: str) -> None:
        found.append((ok, reason))
        loop.stop()

    builtin._Tcp(loop, ("both.test", silent_port), 0.5, ended, refused_is_alive=True)
    loop.run()
    loop.close()
    assert found == [(True, "the host refuses, so it is there")]


@pytest.mark.parametrize(
    ("addresses", "reason"),
    [
        (["::1", "127.0.0.1"], "connection refused"),
        (["fe80::1%lo", "127.0.0.1"], "connection refused"),
        (["127.0.0.1", "fe80::1%lo"], "connection refused"),
        (["fe80::1%lo", "fe80::1"], "network is unreachable|invalid argument"),
    ],
)
async def test_the_reason_is_what_the_device_says(
    names: Names, addresses: list[str], reason: str
) -> None:
    """When all addresses fail, the reason is an answer of the device rather than an error of this host."""
    names("both.test", *addresses)
    ok, told = await asked("both.test", kind="tcp", port=free_port(), timeout_s=20.0)
    assert not ok
    assert told in reason.split("|")


def test_a_name_has_at_most_eight_addresses_and_nobody_is_called_after_the_end(
    names: Names,
) -> None:
    """Of a name with 50 addresses eight are tried, in order; a cancelled connection invokes no callback."""
    names("many.test", *(f"127.0.1.{n}" for n in range(1, 51)))
    loop, seen, over = Loop(), [], []
    turns = Turns(
        loop,
        ("many.test", 1),
        20.0,
        lambda _family, where: seen.append(where[0]) or turns.loop.later(0, _fail),
        lambda error, _sent: over.append(error) or loop.stop(),
    )

    def _fail() -> None:
        turns.failed(OSError(111, ""))

    loop.run()
    assert seen == [f"127.0.1.{n}" for n in range(1, 9)]
    assert [one.errno for one in over] == [111]
    Dial(loop, ("many.test", 1), 1.0, lambda *_: over.append(None)).cancel()
    loop._stopped = False
    loop.later(0.3, loop.stop)
    loop.run()
    loop.close()
    assert len(over) == 1


# -- everything with a different /etc/hosts


def elsewhere(folder: Path, *argv: str) -> list[str]:
    """The command, with `localhost` and `both.test` resolving to ::1 first and 127.0.0.1 second."""
    hosts = folder / "hosts"
    hosts.write_text(LOCALHOST)
    return [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount --bind {hosts} /etc/hosts && exec "$@"',
        "-",
        *argv,
    ]


@pytest.mark.parametrize("name", ["localhost", "both.test"])
async def test_an_agent_reaches_servers_at_the_second_address(
    world: World, tmp_path: Path, name: str
) -> None:
    """With a name that resolves to ::1 first, and servers on 127.0.0.1 only, an agent reaches its device, registers in
    Consul, reports, ships its log and sends an alert."""
    urls = {}
    for key in ("consul", "loki", "sink"):
        other = type(world.device)(says(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
        await other.start()
        world.others.append(other)
        urls[key] = f"http://{name}:{other.port}"
    agent = world.agent(
        argv=elsewhere(tmp_path, sys.executable, "-P", "-m", "watchdog_agent"),
        address=name,
        api=[f"http://{name}:{world.peer.port}"],
        consul=urls["consul"],
        loki={"url": urls["loki"]},
        escalate={
            "sinks": [{"kind": "webhook", "url": urls["sink"]}],
            "consul_wait_s": 0.5,
            "gather_s": 0.2,
        },
    )
    await agent.start()
    await world.peer.saw("ready", state="ok", ready=True)
    await until(lambda: any(one["msg"] == "consul: registered" for one in agent.log), "Consul")
    await world.device.stop()

    async def done() -> bool:
        status = await agent.status()
        return status["escalations"]["sent"] > 0 and status["logs"]["shipped"] > 0

    await until(done, "deliveries", 30.0)


CONTROL = """
import asyncio, sys
import aiohttp
from nomad_watchdog.clients.consul import ConsulClient, ConsulAccess
from nomad_watchdog.clients.nomad import NomadClient, NomadAccess
from nomad_watchdog.cli._api_client import ApiClient
async def main(base):
    consul = ConsulClient(ConsulAccess(address=base))
    print(await consul.kv_get("a"))
    await consul.close()
    nomad = NomadClient(NomadAccess(address=base))
    print(await nomad.job("a"))
    await nomad.close()
    async with aiohttp.ClientSession() as session, session.get(base) as answer:
        print(answer.status)
for base in sys.argv[1:]:
    asyncio.run(main(base))
    print(ApiClient(base, None, tls=lambda: None).get("/v1/status"))
"""


async def test_the_control_plane_reaches_servers_at_the_second_address(tmp_path: Path) -> None:
    """The clients of Consul, Nomad and the API, and those of replicas and metrics, fall back to 127.0.0.1."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            status = b"404 Not Found" if b"/kv/" in head else b"200 OK"
            writer.write(
                b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\n"
                b"X-Consul-Index: 1\r\nContent-Length: 2\r\n\r\n{}"
            )

    async with tcp(speak) as port:
        urls = [f"http://{name}:{port}" for name in ("localhost", "both.test")]
        argv = elsewhere(tmp_path, sys.executable, "-c", CONTROL, *urls)
        env = {**os.environ, "no_proxy": "*"}
        done = await asyncio.to_thread(
            subprocess.run, argv, capture_output=True, text=True, env=env, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["None", "{}", "200", "{}"] * 2 + [""]


# -- A1: ICMP over IPv6

PINGS = """
import json, sys
from watchdog_agent.config import document as config, probes as config_probes, gateway as gateway_config; from watchdog_agent.probes import gateway, builtin as probes
from watchdog_agent.runtime.loop import Loop
for address in sys.argv[1:]:
    loop, found = Loop(), []
    def done(ok, reason, *_):
        found.append((ok, reason)); loop.stop()
    probes.start(loop, config_probes.check({"kind": "icmp", "timeout_s": 0.3}, ""), address, done)
    loop.run()
    part = {"address": "127.0.0.1", "labels": {"gateway": address}, "gateway": {"timeout_s": 0.3}}
    gateway_config.check(part)
    one = gateway.Gateway(loop, part["gateway"])
    one.probe(lambda ok: loop.stop())
    loop._stopped = False
    loop.run()
    loop.close()
    print(json.dumps([address, *found[0], one.answers, probes.echo_socket(10)[1]]))
"""


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "datagram"])
def test_an_echo_over_ipv6(raw: bool) -> None:
    """Through a raw and through a datagram socket ::1, a link-local address with its zone and an address of another
    interface answer as device and as gateway; unused addresses next to them do not."""
    setup = [
        "ip link set lo up",
        "ip link add v0 type veth peer name v1 && ip link set v0 up && ip link set v1 up",
        "ip -6 addr add fe80::1/64 dev lo nodad",
        "ip -6 addr add fd00::7/64 dev v0 nodad",
        f"echo '{'1 0' if raw else '0 0'}' > /proc/sys/net/ipv4/ping_group_range",
        'exec "$@"',
    ]
    alive, dead = ["::1", "fe80::1%lo", "fd00::7"], ["fe80::2%v0", "fd00::8"]
    argv = ["unshare", "-n", "sh", "-e", "-c", "\n".join(setup), "-"]
    done = subprocess.run(
        [*argv, sys.executable, "-c", PINGS, *alive, *dead],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(AGENT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[:3] == [[one, True, "echo", True, raw] for one in alive]
    assert [(one[0], one[1], one[3], one[4]) for one in found[3:]] == [
        (one, False, False, raw) for one in dead
    ]


@pytest.mark.parametrize("first", ["fe80::1%lo", "127.255.255.255"])
async def test_an_echo_of_the_next_address(names: Names, first: str) -> None:
    """A device whose first address is unreachable is found by an echo of its second, in either order."""
    names("both.test", first, "127.0.0.1")
    names("back.test", "::1", first)
    for name in ("both.test", "back.test"):
        assert await asked(name, kind="icmp", timeout_s=20.0) == (True, "echo")
    names("none.test", first, first)
    ok, reason = await asked("none.test", kind="icmp", timeout_s=20.0)
    assert not ok
    assert reason in ("network is unreachable", "permission denied")


# -- A6, A7: what is sent to the peer


async def sent(names: Names, address: str, listen: str = "127.0.0.1", **spec: Any) -> list[str]:
    """The lines of the request that a device at this address receives, wherever the name resolves."""
    heads: list[bytes] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK)

    async with tcp(speak, spec.pop("context", None)) as port:
        names(address, listen, port=port)
        ok, reason = await asked(address, timeout_s=20.0, **spec)
    assert ok, reason
    return heads[0].decode().split("\r\n")


@pytest.mark.parametrize(
    ("address", "port", "host"),
    [
        ("fe80::1%lo", 80, "[fe80::1]"),
        ("fe80::1%lo", 8080, "[fe80::1]:8080"),
        ("fd00::1", 443, "[fd00::1]:443"),
        ("10.0.0.9", 80, "10.0.0.9"),
        ("dev.test.", 80, "dev.test"),
        ("dev.test", 8000, "dev.test:8000"),
    ],
)
async def test_host_over_http(names: Names, address: str, port: int, host: str) -> None:
    """Host has neither zone nor final dot, and a port only if it is not the default of http; the request names the
    program that sends it."""
    lines = await sent(names, address, kind="http", port=port)
    assert [one for one in lines if one.startswith("Host:")] == [f"Host: {host}"]
    assert "User-Agent: watchdog-agent" in lines
    assert "Accept: */*" in lines


@pytest.mark.parametrize(
    ("address", "port", "host"),
    [("dev.test.", 443, "dev.test"), ("dev.test", 8443, "dev.test:8443"), ("fe80::1%lo", 443, "[fe80::1]")],
)  # fmt: skip
async def test_host_over_https(names: Names, address: str, port: int, host: str) -> None:
    """Over https 443 is the default port."""
    authority = trustme.CA()
    lines = await sent(
        names,
        address,
        kind="https",
        port=port,
        context=context_of(authority.issue_cert("dev.test", "fe80::1")),
        ca_cert=authority.cert_pem.bytes().decode(),
    )
    assert f"Host: {host}" in lines


@pytest.mark.parametrize("kind", ["https", "tls", "mqtt"])
@pytest.mark.parametrize(
    ("address", "named", "sni"),
    [
        ("dev.test.", None, "dev.test"),
        ("dev.test", None, "dev.test"),
        ("10.0.0.9", "dev.test.", "dev.test"),
        ("fe80::1%lo", None, None),
        ("10.0.0.9", None, None),
    ],
)
async def test_server_name_of_tls(
    names: Names, kind: str, address: str, named: str | None, sni: str | None
) -> None:
    """The certificate of dev.test is valid for `dev.test.`, and one of an address for the address with a zone; SNI has
    no final dot, and is not sent for addresses."""
    authority, seen = trustme.CA(), []
    context = context_of(authority.issue_cert("dev.test", "fe80::1", "10.0.0.9"))
    context.sni_callback = lambda _socket, name, _context: seen.append(name)
    spec = {"kind": kind, "server_name": named, "ca_cert": authority.cert_pem.bytes().decode()}
    spec |= {"tls": True} if kind == "mqtt" else {}
    async with tcp(mqtt(CONNACK) if kind == "mqtt" else says(OK), context) as port:
        names(address, "127.0.0.1", port=port)
        ok, reason = await asked(address, port=443, timeout_s=20.0, **spec)
    assert ok, reason
    assert seen == [sni]


@pytest.mark.parametrize(
    ("text", "host", "port", "header"),
    [
        ("http://localhost", "localhost", 80, "localhost"),
        ("http://localhost:80/", "localhost", 80, "localhost"),
        ("https://consul.test.:443/a/", "consul.test.", 443, "consul.test"),
        ("https://[::1]:8501", "::1", 8501, "[::1]:8501"),
        ("http://[fe80::1%25eth0]:8500", "fe80::1%eth0", 8500, "[fe80::1]:8500"),
        ("http://[fe80::1%eth0]", "fe80::1%eth0", 80, "[fe80::1]"),
    ],
)
def test_addresses_of_servers(text: str, host: str, port: int, header: str) -> None:
    """A URL gives the address to connect to, with the zone, and the host name to send, without it."""
    url = Url(text, tls=True)
    assert (url.host, url.port, url.host_header) == (host, port, header)


@pytest.mark.parametrize(
    "port", ["9" * 5000, "0", "65536", "+80", " 80", "8_0", "²", "-1"], ids=itertools.count()
)
def test_ports_of_servers(port: str) -> None:
    """An invalid port is a ValueError, however long it is."""
    with pytest.raises(ValueError):
        Url(f"http://localhost:{port}/")


def test_a_server_at_another_default_port_is_told_it() -> None:
    """Consul's default port is not that of http, so Host includes it."""
    assert Url("http://consul.test", 8500).host_header == "consul.test:8500"
    assert http.host_header("a.test.", 443, secure=True) == "a.test"
    assert http.host_header("a.test.", 443, secure=False) == "a.test:443"
