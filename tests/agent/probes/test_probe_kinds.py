"""Each kind of probe against a real server, or against one that answers incorrectly."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from amqtt.broker import Broker
from dnslib import AAAA, QTYPE, RR, A, DNSRecord
from watchdog_agent.config import probes as config_probes
from watchdog_agent.errors import ConfigError
from watchdog_agent.probes import builtin, snmp
from watchdog_agent.probes import command as probe_command
from watchdog_agent.runtime import tls_trust
from watchdog_agent.runtime.loop import Loop

from nomad_watchdog.demo.process import free_port
from tests.agent.probing import asked, run, tcp, udp
from tests.agent.world import OK, says, silent, until

# -- http


@pytest.mark.parametrize(
    ("body", "expected", "wanted"),
    [
        (b"all is well", {"expect_body": "is well"}, (True, "status 200")),
        (b"broken", {"expect_body": "is well"}, (False, "'is well' is not in its first 64 KiB")),
        (b"x", {"expect_status": [204, 200]}, (True, "status 200")),
        (b"x", {"expect_status": [204, 301]}, (False, "status 200, not 204 or 301")),
    ],
)
async def test_http_expectations(body: bytes, expected: dict, wanted: tuple[bool, str]) -> None:
    """Status and body are judged as the class expects, with a reason that states what was missing."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    async with tcp(says(head + body)) as port:
        ok, reason = await asked(kind="http", port=port, **expected)
    assert ok is wanted[0]
    assert wanted[1] in reason


async def test_an_endless_body_is_read_no_further_than_64_kib() -> None:
    """A text beyond the first 64 KiB of an endless body is not found, and the probe ends by itself."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"y" * 70_000 + b"needle")
        while True:
            writer.write(b"z" * 65536)
            await writer.drain()

    async with tcp(speak) as port:
        ok, reason = await asked(kind="http", port=port, expect_body="needle", timeout_s=20.0)
    assert not ok
    assert "not in its first 64 KiB" in reason


# -- tls


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def context_of(certificate: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


async def tls_asked(authority: trustme.CA, days: float, **spec: Any) -> tuple[bool | None, str]:
    """The result of a probe of a server whose certificate is valid for this number of days."""
    until_when = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    began = until_when - dt.timedelta(days=90)
    certificate = authority.issue_cert(
        "127.0.0.1", "pump.example", not_before=began, not_after=until_when
    )
    pem = authority.cert_pem.bytes().decode()
    async with tcp(says(OK), context_of(certificate)) as port:
        return await asked(
            **{"kind": "tls", "port": port, "ca_cert": pem, "timeout_s": 10.0, **spec}
        )


async def test_a_certificate_with_few_days_left_is_a_success_with_a_warning(
    authority: trustme.CA,
) -> None:
    """V7: with `warn_days = 14`, a certificate with 13 days left is a success with the date in the warning; more days
    give no warning, and an expired certificate is a miss. `min_days` is the old name of `warn_days`."""

    def date(days: float) -> str:
        return f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=days):%Y-%m-%d}"

    for days, spec, warned in (
        (30.1, {}, ""),
        (13.1, {}, " (warn_days is 14)"),
        (13.1, {"min_days": 14}, " (warn_days is 14)"),
        (5.1, {"warn_days": 3}, ""),
        (5.1, {"warn_days": 5.5}, " (warn_days is 5.5)"),
    ):
        warnings: list[str] = []
        wanted = f"its certificate expires on {date(days)}, in {days:.0f} days"
        assert await tls_asked(authority, days, warnings=warnings, **spec) == (True, wanted)
        assert warnings == [wanted + warned if warned else ""]
    ok, reason = await tls_asked(authority, -2.1, verify=False)
    assert (ok, reason) == (False, f"its certificate expired on {date(-2.1)}, 2 days ago")


async def test_tls_name_and_trust(authority: trustme.CA) -> None:
    """A certificate for another name, or from another CA, is a miss unless `verify = false`."""
    assert (await tls_asked(authority, 50, server_name="pump.example"))[0]
    ok, reason = await tls_asked(authority, 50, server_name="other.example")
    assert not ok
    assert "TLS" in reason
    other = trustme.CA().cert_pem.bytes().decode()
    assert not (await tls_asked(authority, 50, ca_cert=other))[0]
    assert (await tls_asked(authority, 50, ca_cert=other, verify=False))[0]


async def test_https_probe(authority: trustme.CA) -> None:
    """https is http after a handshake, and `tls = true` is another way to request it."""
    for named in ({"kind": "https"}, {"kind": "http", "tls": True}):
        assert await tls_asked(authority, 50, **named) == (True, "status 200")
    assert not (await tls_asked(authority, 50, kind="https", expect_status=204))[0]


def strict_context(authority: trustme.CA, version: ssl.TLSVersion) -> ssl.SSLContext:
    """The TLS context of a server that requires a client certificate from this CA."""
    context = context_of(authority.issue_cert("127.0.0.1"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = version
    authority.configure_trust(context)
    return context


@contextlib.contextmanager
def strict(
    authority: trustme.CA, *answers: bytes, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> Iterator[int]:
    """The port of a TLS server that requires a client certificate; after the client's first bytes it sends these
    pieces. A thread: asyncio's servers hang up on a bad certificate before their alert is sent."""
    context = strict_context(authority, version)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                raw.settimeout(10.0)
                with raw, contextlib.suppress(OSError):
                    serve_one(raw)

        def serve_one(raw: socket.socket) -> None:
            with context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False) as one:
                try:
                    one.do_handshake()
                except ssl.SSLError:
                    # unread data at the end would overtake the alert
                    while socket.socket.recv(one, 4096):
                        pass
                    raise
                if one.recv(4096):
                    for answer in answers:
                        one.sendall(answer)
                        time.sleep(0.02)
                    one.unwrap()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def own(authority: trustme.CA, folder: Path) -> dict[str, str]:
    """The settings of a probe with a client certificate from this CA, in two files."""
    made = authority.issue_cert("agent.example")
    made.private_key_pem.write_to_path(str(folder / "key.pem"))
    made.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    return {
        "client_cert": str(folder / "cert.pem"),
        "client_key": str(folder / "key.pem"),
    }


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("kind", ["tls", "https"])
async def test_client_certificate(
    authority: trustme.CA, tmp_path: Path, kind: str, version: ssl.TLSVersion
) -> None:
    """A server that requires a client certificate accepts ours, and rejects one from another CA, which is a miss: in
    TLS 1.3 too, where it rejects only after our side of the handshake is done."""
    pem = authority.cert_pem.bytes().decode()
    spec = {"kind": kind, "ca_cert": pem, "timeout_s": 10.0}
    mine = own(authority, tmp_path)
    with strict(authority, OK, version=version) as port:
        assert (await asked(port=port, **spec, **mine))[0]
        own(trustme.CA(), tmp_path)
        ok, reason = await asked(port=port, **spec, **mine)
    assert not ok
    assert "unknown ca" in reason


async def test_a_client_certificate_that_is_missing_is_a_miss(authority: trustme.CA) -> None:
    """Without a client certificate, a server that requires one only rejects the connection, which is a miss."""
    pem = authority.cert_pem.bytes().decode()
    with strict(authority, OK) as port:
        ok, reason = await asked(kind="https", port=port, ca_cert=pem, timeout_s=10.0)
    assert not ok
    assert "certificate required" in reason


async def test_a_server_that_hangs_up_refuses_the_certificate(
    authority: trustme.CA, tmp_path: Path
) -> None:
    """A server that hangs up on our certificate, without the TLS alert for it, is a miss."""
    pem = authority.cert_pem.bytes().decode()
    spec = {"kind": "tls", "ca_cert": pem, "timeout_s": 10.0}
    context = strict_context(authority, ssl.TLSVersion.TLSv1_3)
    async with tcp(says(OK), context) as port:
        assert (await asked(port=port, **spec, **own(authority, tmp_path)))[0]
        ok, _ = await asked(port=port, **spec, **own(trustme.CA(), tmp_path))
    assert not ok


async def test_a_renewed_certificate_is_used_without_a_restart(
    authority: trustme.CA, tmp_path: Path
) -> None:
    """Replaced files are used from the next probe on, without a restart; after half a replacement, where key and
    certificate do not match, the old pair stays in use."""
    pem = authority.cert_pem.bytes().decode()
    mine = own(trustme.CA(), tmp_path)
    with strict(authority, OK) as port:
        spec = config_probes.check(
            {"kind": "https", "port": port, "ca_cert": pem, "timeout_s": 10.0, **mine}, "probe"
        )
        assert not (await asyncio.to_thread(run, spec))[0]
        own(authority, tmp_path)
        assert await asyncio.to_thread(run, spec) == (True, "status 200")
        trustme.CA().issue_cert("x.example").private_key_pem.write_to_path(mine["client_key"])
        assert await asyncio.to_thread(run, spec) == (True, "status 200")


def test_a_certificate_renewed_while_it_is_read_is_read_again(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files replaced while they are being read are used from the next probe on."""
    mine = own(authority, tmp_path)
    read = tls_trust.context_of

    def overtaken(spec: dict[str, Any]) -> ssl.SSLContext:
        context = read(spec)
        time.sleep(0.05)  # more than a tick of the file system's clock
        own(trustme.CA(), tmp_path)
        return context

    monkeypatch.setattr(tls_trust, "context_of", overtaken)
    spec = config_probes.check({"kind": "https", "port": 443, **mine}, "probe")
    monkeypatch.undo()
    old = spec["trust"].context
    new = spec["trust"].now()
    assert new is not old
    assert spec["trust"].now() is new


def test_a_key_with_a_password_is_unable_and_nobody_is_asked(
    authority: trustme.CA, tmp_path: Path
) -> None:
    """With an encrypted client key the probe is unable; OpenSSL does not prompt for a password on a terminal."""
    from cryptography.hazmat.primitives import serialization

    mine = own(authority, tmp_path)
    key = serialization.load_pem_private_key(Path(mine["client_key"]).read_bytes(), None)
    Path(mine["client_key"]).write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"pa55"),
        )
    )
    ok, reason = run(config_probes.check({"kind": "tls", **mine}, "probe"))
    assert ok is None
    assert reason.startswith("client_cert: ")


async def test_a_server_that_never_shakes_hands_ends_at_the_timeout() -> None:
    """A peer that accepts but never shakes hands, or does not speak TLS, takes at most the timeout."""
    async with tcp(silent) as port:
        ok, reason = await asked(kind="tls", port=port, timeout_s=0.3)
    assert (ok, reason) == (False, "no answer within 0.3 s")

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-x\r\n" * 10)
        await reader.read()

    async with tcp(garbage) as port:
        ok, reason = await asked(kind="tls", port=port, timeout_s=10.0)
    assert not ok
    assert reason.startswith("TLS")


# -- dns


def zone(data: bytes) -> bytes:
    """Answers as a real server's library packs them, with compressed names."""
    query = DNSRecord.parse(data)
    reply = query.reply()
    name = str(query.q.qname)
    if name == "pump.example.":
        kind = QTYPE[query.q.qtype]
        data_of = {"A": A("10.1.2.3"), "AAAA": AAAA("fd00::7")}
        reply.add_answer(RR("alias.example", QTYPE.A, rdata=A("10.9.9.9")))
        reply.add_answer(RR(name, query.q.qtype, rdata=data_of[kind]))
    elif name == "gone.example.":
        reply.header.rcode = 3
    return reply.pack()


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ({"name": "pump.example", "expect_address": "10.1.2.3"}, (True, "10.1.2.3")),
        ({"name": "pump.example", "type": "AAAA"}, (True, "fd00::7")),
        ({"name": "pump.example", "expect_address": "10.1.2.4"}, (False, ", not 10.1.2.4")),
        ({"name": "gone.example"}, (False, "gone.example: no such name")),
        ({"name": "empty.example"}, (False, "empty.example has no A record")),
    ],
)
async def test_dns(spec: dict, wanted: tuple[bool, str]) -> None:
    """The name is queried, and the server's answer is judged."""
    async with udp(zone) as port:
        ok, reason = await asked(kind="dns", server="127.0.0.1", port=port, **spec)
    assert ok is wanted[0]
    assert wanted[1] in reason


async def test_dns_server_that_loses_the_first_packet() -> None:
    """One lost packet is no miss: the query is sent again within the timeout."""
    seen: list[bytes] = []

    def second(data: bytes) -> bytes | None:
        seen.append(data)
        return zone(data) if len(seen) == 2 else None

    async with udp(second) as port:
        assert (await asked(kind="dns", port=port, name="pump.example", timeout_s=6.0))[0]
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "tail",
    [
        b"\xc0\x80" + b"\0" * 30,
        b"\xc0\x1e\x00\x01\x00\x01\x00\x00\x00\x00\xff\xff",
        b"\x3f" * 300,
        b"\x80\x00",
        b"",
    ],
    ids=["forward", "long", "label", "kind", "cut"],
)
async def test_hostile_dns_answer(tail: bytes) -> None:
    """An answer with looping pointers, unterminated labels or truncated records is reported as not DNS."""

    def hostile(data: bytes) -> bytes:
        return data[:2] + struct.pack("!HHHHH", 0x8180, 1, 9, 0, 0) + data[12:] + tail

    async with udp(hostile) as port:
        ok, reason = await asked(kind="dns", port=port, name="pump.example")
    assert not ok
    assert "not DNS" in reason


# -- snmp


def snmp_answer(data: bytes, *, error: int = 0, value: bytes = b"\x43\x03\x01\xe2\x40") -> bytes:
    """The answer of an SNMP agent (RFC 3416, 4.2.1), built from the request without a library."""
    message, _ = snmp.read_element(data, 0, 0x30)
    _, at = snmp.number(message, 0)
    community, at = snmp.read_element(message, at, 4)
    pdu, _ = snmp.read_element(message, at, 0xA0)
    ident, _ = snmp.number(pdu, 0)
    tlv, integer = snmp.tlv, snmp.integer
    binding = tlv(0x30, tlv(6, snmp.UP_TIME) + value)
    said = integer(ident) + integer(error) + integer(0) + tlv(0x30, binding)
    return tlv(0x30, integer(1) + tlv(4, community) + tlv(0xA2, said))


async def test_snmp(tmp_path: Path) -> None:
    """sysUpTime is read with the community from a file, and the request has the bytes of RFC 3416."""
    (tmp_path / "community").write_text("s3cret\n")
    seen: list[bytes] = []

    def answer(data: bytes) -> bytes:
        seen.append(data)
        return snmp_answer(data)

    async with udp(answer) as port:
        spec = {"kind": "snmp", "port": port, "community_file": str(tmp_path / "community")}
        assert await asked(**spec) == (True, "up for 1234 s")
    # 30 len, version 1, community, [0] with id, 0, 0, {{1.3.6.1.2.1.1.3.0, null}}
    assert seen[0][2:13] == b"\x02\x01\x01\x04\x06s3cret"
    assert seen[0].endswith(
        b"\x02\x01\x00\x02\x01\x00\x30\x0e\x30\x0c\x06\x08+\x06\x01\x02\x01\x01\x03\x00\x05\x00"
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: b"\xff" * 400, "not SNMP"),
        (lambda _: b"\x30\x84\xff\xff\xff\xff", "not SNMP"),
        (lambda data: data[:9], "not SNMP"),
        (lambda data: snmp_answer(data, error=2), "no such name"),
        (lambda data: snmp_answer(data, value=b"\x80\x00"), "no sysUpTime"),
    ],
    ids=["garbage", "long", "cut", "error", "missing"],
)
async def test_hostile_snmp_answer(answer: Any, reason: str) -> None:
    """Anything but an SNMP agent's answer is a miss with a reason."""
    async with udp(answer) as port:
        ok, said = await asked(kind="snmp", port=port)
    assert not ok
    assert reason in said


# -- mqtt


async def test_mqtt_with_a_real_broker() -> None:
    """A real broker accepts our CONNECT, and we disconnect as MQTT requires."""
    port = free_port()
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {
                "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
            },
        }
    )
    await broker.start()
    try:
        assert await asked(kind="mqtt", port=port, timeout_s=10.0) == (True, "connected")
    finally:
        await broker.shutdown()


async def test_mqtt_over_tls_with_a_real_broker(authority: trustme.CA, tmp_path: Path) -> None:
    """A real broker behind TLS accepts our CONNECT if we trust its CA and its name; otherwise nothing is sent to it."""
    made = authority.issue_cert("broker.example")
    made.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    made.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    port = free_port()
    broker = Broker(
        {
            "listeners": {
                "default": {
                    "type": "tcp",
                    "bind": f"127.0.0.1:{port}",
                    "ssl": True,
                    "certfile": str(tmp_path / "cert.pem"),
                    "keyfile": str(tmp_path / "key.pem"),
                }
            },
            "plugins": {
                "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
            },
        }
    )
    pem = authority.cert_pem.bytes().decode()
    spec = {"kind": "mqtt", "tls": True, "port": port, "timeout_s": 10.0}
    await broker.start()
    try:
        trusting = {**spec, "ca_cert": pem}
        assert await asked(**trusting, server_name="broker.example") == (True, "connected")
        ok, reason = await asked(**trusting)
        assert not ok
        assert "TLS" in reason
        assert not (await asked(**spec, server_name="broker.example"))[0]
        assert (await asked(**spec, verify=False))[0]
        assert not (await asked(kind="mqtt", port=port, timeout_s=1.0))[0]
    finally:
        await broker.shutdown()


async def test_mqtt_over_tls_with_a_client_certificate(
    authority: trustme.CA, tmp_path: Path
) -> None:
    """A broker that requires a client certificate accepts ours and rejects one from another CA; its CONNACK is read as
    without TLS, also in pieces."""
    pem = authority.cert_pem.bytes().decode()
    spec = {"kind": "mqtt", "tls": True, "ca_cert": pem, "timeout_s": 10.0}
    mine = own(authority, tmp_path)
    with strict(authority, b"\x20", b"\x02\x00", b"\x00") as port:
        assert await asked(port=port, **spec, **mine) == (True, "connected")
        own(trustme.CA(), tmp_path)
        ok, reason = await asked(port=port, **spec, **mine)
    assert not ok
    assert "unknown ca" in reason


async def test_mqtt_password_comes_from_a_file(tmp_path: Path) -> None:
    """The user and the password from a file are in CONNECT in the order of 3.1.3; a rejection states why."""
    (tmp_path / "password").write_text("pa55\n")
    seen: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(4096))
        writer.write(b"\x20\x02\x00\x04")

    async with tcp(refuse) as port:
        answer = await asked(
            kind="mqtt", port=port, user="ann", password_file=str(tmp_path / "password")
        )
    assert answer == (False, "wrong user or password")
    assert seen[0][2:10] == b"\x00\x04MQTT\x04\xc2"
    assert seen[0].endswith(b"\x00\x03ann\x00\x04pa55")


async def test_mqtt_broker_that_answers_garbage() -> None:
    """A broker that sends something else, or hangs up without an answer, is a miss with a reason."""
    async with tcp(says(b"")) as port:
        assert not (await asked(kind="mqtt", port=port, timeout_s=0.5))[0]

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with tcp(speak) as port:
        assert await asked(kind="mqtt", port=port) == (False, "its answer is not MQTT")


# -- command


def command(*argv: str, timeout_s: float = 10.0) -> tuple[bool, str]:
    return run(
        config_probes.check(
            {"kind": "command", "command": list(argv), "timeout_s": timeout_s}, "probe"
        ),
        "10.0.0.7",
    )


def test_command_is_judged_by_its_exit_code() -> None:
    """Exit code 0 is a success, another code or a signal is a miss, a missing program is unable; the last line of
    output is the reason."""
    assert command("true") == (True, "exit 0")
    assert command("sh", "-c", "echo first; echo $WATCHDOG_ADDRESS") == (True, "10.0.0.7")
    assert command("sh", "-c", "echo 'no \x1b[1mdisk' >&2; exit 3") == (
        False,
        "exit 3: no ?[1mdisk",
    )
    assert command("sh", "-c", "kill -9 $$") == (False, "killed by signal 9")
    assert command("sh", "-c", "yes | head -c 60000; echo; echo last") == (True, "last")
    assert command("/no/such/program") == (
        None,
        "/no/such/program: no such file or directory",
    )


def test_command_gets_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command does not receive a token from the agent's environment (S10)."""
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "s3cret")
    assert command("sh", "-c", "echo ${CONSUL_HTTP_TOKEN:-none}") == (True, "none")


async def test_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    """At the timeout the program and its children are killed, and no zombie is left."""
    script = f"sleep 600 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/self; wait"
    answer = await asyncio.to_thread(command, "sh", "-c", script, timeout_s=1.0)
    assert answer == (False, "not finished within 1 s")
    for name in ("child", "self"):
        pid = int((tmp_path / name).read_text())

        def gone(pid: int = pid) -> bool:
            stat = Path(f"/proc/{pid}/stat")
            try:
                return stat.read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                return True

        await until(gone, f"{name} is gone")
    with pytest.raises(ChildProcessError):
        os.waitpid(int((tmp_path / "self").read_text()), os.WNOHANG)


HELD = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # whoever likes may trace us
me = os.getpid()
if os.fork() == 0:
    os.setsid()
    if libc.ptrace(0x4206, me, 0, 0) == 0:  # PTRACE_SEIZE
        with open(sys.argv[1], "w") as file:
            file.write(f"{me} {os.getpid()}")
    time.sleep(30)
    os._exit(0)
time.sleep(600)
"""
"""Traced by a child that outlives it, a killed program can't be reaped before the child is gone: to its parent this is
the same as one that hangs in a dead file system, and easier to create."""


def test_command_that_can_not_be_reaped_holds_up_nobody(tmp_path: Path) -> None:
    """A program that hangs in the kernel is reported at its timeout; no other is started meanwhile; when the kernel
    releases it, it is reaped, and the next run is normal."""
    told = tmp_path / "told"
    argv = [sys.executable, "-c", HELD, str(told)]
    spec = config_probes.check({"kind": "command", "command": argv, "timeout_s": 3.0}, "probe")
    loop = Loop()
    answers: list[tuple[bool | None, str]] = []

    def done(ok: bool | None, reason: str, _took_s: float, _warning: str) -> None:
        answers.append((ok, reason))
        if len(answers) == 1:
            held = Path(f"/proc/{told.read_text().split()[0]}")
            assert held.exists(), "judged only when the kernel had let go"
            builtin.start(loop, spec, "10.0.0.7", done)
        elif len(answers) == 2:
            os.kill(int(told.read_text().split()[1]), signal.SIGKILL)
            spec["command"][:] = ["true"]
            reaped()
        else:
            loop.stop()

    def reaped() -> None:
        if probe_command._running:
            loop.later(0.01, reaped)
        else:
            builtin.start(loop, spec, "10.0.0.7", done)

    try:
        builtin.start(loop, spec, "10.0.0.7", done)
        loop.later(120.0, loop.stop)
        loop.run()
    finally:
        loop.close()
    assert answers == [
        (False, "not finished within 3 s"),
        (None, "its last run was killed and hangs in the kernel"),
        (True, "exit 0"),
    ]
    assert not Path(f"/proc/{told.read_text().split()[0]}").exists()


def test_command_on_a_kernel_without_pidfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pidfd the end of a program is still noticed, and a killed program is reaped."""
    monkeypatch.delattr(os, "pidfd_open")
    assert command("sh", "-c", "echo well; exit 0") == (True, "well")
    script = f"echo $$ > {tmp_path}/self; sleep 600"
    assert command("sh", "-c", script, timeout_s=0.5) == (False, "not finished within 0.5 s")
    assert not Path(f"/proc/{(tmp_path / 'self').read_text().strip()}").exists()


def test_command_that_talks_without_end_is_killed() -> None:
    """A command that writes more than 1 MiB is killed, long before its timeout."""
    assert command("yes", timeout_s=60.0) == (False, "it wrote more than 1 MiB")


def test_command_whose_child_holds_the_pipe_has_ended() -> None:
    """A program that exits while its child keeps its output open is judged by its exit code at once, not at its timeout
    as a miss."""
    assert command("sh", "-c", "sleep 600 & echo done", timeout_s=60.0) == (True, "done")


# -- file


class Log:
    """A log file and its probe."""

    def __init__(self, path: Path, **spec: Any) -> None:
        self.path = path
        self.spec = config_probes.check({"kind": "file", "file": str(path), **spec}, "probe")

    def add(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)

    def look(self) -> tuple[bool, str]:
        return run(self.spec)

    def close(self) -> None:
        if self.spec["follower"].file is not None:
            self.spec["follower"].file.close()


@pytest.fixture
def log(tmp_path: Path) -> Any:
    """A log that must not contain ERROR, checked once."""
    (tmp_path / "log").write_text("ERROR of yesterday\n")
    it = Log(tmp_path / "log", forbid_text="ERROR")
    assert it.look() == (True, "log is watched from its end on")
    yield it
    it.close()


def test_only_what_was_appended_counts(log: Log) -> None:
    """Old lines are not judged, new ones are judged once each; a text written in two parts is found."""
    assert log.look()[0]
    log.add("all well\nERROR of today\n")
    assert log.look() == (False, "log says 'ERROR'")
    log.add("all well again\nERR")
    assert log.look()[0]
    log.add("OR in two parts\n")
    assert not log.look()[0]
    assert log.look()[0]


def test_rotation_loses_no_line(log: Log) -> None:
    """What was written just before and just after a rotation is read; and so after a truncation."""
    log.add("ERROR\n")
    log.path.rename(log.path.with_name("log.1"))
    assert log.look() == (False, f"{log.path}: no such file or directory")
    log.add("new\n")
    assert log.look() == (False, "log says 'ERROR'")
    log.path.rename(log.path.with_name("log.1"))
    log.add("ERROR\n")
    assert not log.look()[0]
    log.path.write_text("")
    assert log.look()[0]
    log.add("ERROR\n")
    assert not log.look()[0]


def test_a_look_in_between_takes_nothing(log: Log) -> None:
    """An on-demand check sees a new line, and leaves it to the next regular round."""
    log.add("ERROR\n")
    for _ in range(2):
        peeking = {**log.spec, "follower": log.spec["follower"].peek()}
        assert run(peeking) == (False, "log says 'ERROR'")
        peeking["follower"].file.close()
    assert not log.look()[0]
    assert log.look()[0]


def test_a_flood_is_read_up_to_256_kib_and_said(log: Log) -> None:
    """If there is more than a round can read, the newest part is read, and the rest is reported as skipped."""
    log.add("x" * 1_000_000 + "ERROR")
    ok, reason = log.look()
    assert not ok
    assert f"({1_000_005 - 256 * 1024} bytes were skipped)" in reason


def test_expected_text_and_age(tmp_path: Path) -> None:
    """An expected text that is missing from a log, and a file that is not written to, are misses."""
    (tmp_path / "log").write_text("")
    beats = Log(tmp_path / "log", expect_text="beat")
    try:
        beats.look()
        assert beats.look() == (False, "log does not say 'beat'")
        beats.add("a beat\n")
        assert beats.look() == (True, "log says 'beat'")
    finally:
        beats.close()
    aged = Log(tmp_path / "log", max_age_s=60.0)
    assert aged.look()[0]
    os.utime(tmp_path / "log", (time.time() - 100, time.time() - 100))
    assert "60 s are allowed" in aged.look()[1]


def test_a_pipe_in_the_place_of_a_file_holds_up_nobody(tmp_path: Path) -> None:
    """A FIFO is rejected without being opened."""
    os.mkfifo(tmp_path / "log")
    assert Log(tmp_path / "log", forbid_text="x").look() == (False, "log is no regular file")


# -- configuration


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "carrier-pigeon"}, "allowed are tcp, http, icmp, tls"),
        ({"kind": "dns"}, "name is None; expected ASCII"),
        ({"kind": "dns", "name": "a..b"}, "1 to 63"),
        ({"kind": "dns", "name": "a", "type": "MX"}, "allowed are A, AAAA"),
        ({"kind": "dns", "name": "a", "expect_address": "fd00::1"}, "for A records"),
        ({"kind": "command", "command": "rm -rf"}, "list of 1 to 64"),
        ({"kind": "file", "file": "log"}, "begins with /"),
        ({"kind": "file", "file": "/log"}, "needs one of"),
        ({"kind": "mqtt", "password_file": "/x"}, "needs user"),
        ({"kind": "tls", "verify": "no"}, "true and false"),
        ({"kind": "tls", "ca_cert": "-----BEGIN CERTIFICATE-----"}, "ca_cert"),
        ({"kind": "tls", "min_days": 3, "warn_days": 5}, "old name of warn_days"),
        ({"kind": "tcp", "port": 1, "warn_loss": 2}, "warn_loss is 2"),
        ({"kind": "https", "client_key": "/x"}, "client_key needs client_cert"),
        ({"kind": "mqtt", "tls": 1}, "true and false"),
        ({"kind": "mqtt", "tls": True, "ca_cert": "-----BEGIN CERTIFICATE-----"}, "ca_cert"),
        ({"kind": "plugin"}, "entry point"),
        ({"kind": "http", "port": 80, "expect_status": []}, "a list of 1 to 32"),
        ({"kind": "icmp", "jitter": 2}, "0 to 0.5"),
    ],
)
def test_a_wrong_probe_is_refused_in_words(spec: dict, words: str) -> None:
    """An invalid probe is rejected, and the message says what is allowed."""
    with pytest.raises(ConfigError) as caught:
        config_probes.check(spec, "probes")
    assert words in str(caught.value)
