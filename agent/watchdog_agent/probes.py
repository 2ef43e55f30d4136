"""Probes of the device, none of which ever blocks: TCP, HTTP and ICMP here, the others in modules of
their own that are loaded only where they are configured.

Each is started with a callback `done(ok, reason, took_s)` that is called exactly once, at the latest
after its time-out.
"""

from __future__ import annotations

import os
import sys
import time

from . import config_probes, http
from .light import socket, struct
from .loop import READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop
    from .shapes import Address, Ended, Fetched, Probe, Probed

_REFUSED = 111


def start(loop: Loop, spec: Probe, address: str, done: Probed) -> None:
    """Start the probe that `spec` (a checked probe of the configuration) describes."""
    began = time.monotonic()

    def ended(ok: bool, reason: str) -> None:
        done(ok, reason, time.monotonic() - began)

    kind = spec["kind"]
    if kind == "http":
        _http(loop, spec, address, ended)
    elif kind == "tcp":
        _Tcp(loop, (address, spec["port"]), spec["timeout_s"], ended, refused_is_alive=False)
    elif kind in config_probes.MODULES:
        config_probes.module_of(kind).start(loop, spec, address, ended)
    else:
        _icmp(loop, spec, address, ended)


def name_of(spec: Probe) -> str:
    """How a probe is called in reasons: http:8080, tcp:22, icmp, plugin:modbus."""
    if spec["kind"] == "plugin":
        return f"plugin:{spec['plugin']}"
    return f"{spec['kind']}:{spec['port']}" if spec.get("port") else spec["kind"]


def close() -> None:
    """End what probes have started and the end of this process would not."""
    module = sys.modules.get(f"{__package__}.probe_command")
    if module is not None:
        module.close()


def _http(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    http_probe(loop, spec, address, ended, _plain)


def _plain(
    loop: Loop, place: Address, data: bytes, spec: Probe, answered: Fetched, max_body: int
) -> None:
    http.Fetch(loop, place, data, spec["timeout_s"], answered, max_body)


def http_probe(
    loop: Loop, spec: Probe, address: str, ended: Ended, fetch: Callable[..., None]
) -> None:
    """GET, and judge the answer. A redirect is not followed: it is a status like any other."""
    host = f"[{address}]" if ":" in address else address
    began = time.monotonic()

    def answered(status: int | None, _headers: dict[str, str], body: Any) -> None:
        if status is None:
            ended(False, body)
        else:
            ended(*judge_http(spec, status, body, time.monotonic() - began))

    data = http.request("GET", spec.get("path", "/"), f"{host}:{spec['port']}")
    most = 0
    if spec.get("expect_body"):
        # To HTTP/1.0 nobody answers in chunks, which could cut the text that is looked for.
        data = data.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)
        most = http.MAX_BODY
    fetch(loop, (address, spec["port"]), data, spec, answered, most)


def judge_http(spec: Probe, status: int, body: bytes, took_s: float) -> tuple[bool, str]:
    """Status, body and time against what is expected; (ok, reason)."""
    wanted = spec.get("expect_status", 200)
    if status not in (wanted if isinstance(wanted, list) else [wanted]):
        shown = " or ".join(map(str, wanted)) if isinstance(wanted, list) else wanted
        return False, f"status {status}, not {shown}"
    text, most_s = spec.get("expect_body"), spec.get("max_time_s")
    if text and text.encode() not in body:
        return False, f"status {status}, but {text[:60]!r} is not in its first 64 KiB"
    if most_s and took_s > most_s:
        return False, f"status {status}, but only after {took_s:.3f} s; {most_s:g} s are allowed"
    return True, f"status {status}"


class _Tcp:
    """A connection attempt. `refused_is_alive`: for reachability a refusal is an answer too."""

    def __init__(
        self,
        loop: Loop,
        address: Address,
        timeout_s: float,
        ended: Ended,
        *,
        refused_is_alive: bool,
    ) -> None:
        self.loop = loop
        self.ended: Ended | None = ended
        self.refused_is_alive = refused_is_alive
        self.timer = loop.later(
            timeout_s, lambda: self._end(False, f"no answer within {timeout_s:g} s")
        )
        self.sock: socket.socket | None = None
        try:
            family, kind, proto, _, where = http.resolve(address)
            self.sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, proto)
            code = self.sock.connect_ex(where)
        except (OSError, UnicodeError) as error:
            text = http.reason_of(error)
            loop.later(0, lambda: self._end(False, text))
            return
        if code in http.CONNECTING:
            loop.watch(self.sock, WRITE, self._ready)
        else:
            loop.later(0, lambda: self._judge(code))

    def _ready(self, _mask: int) -> None:
        assert self.sock is not None
        self._judge(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _judge(self, code: int) -> None:
        if code == 0:
            self._end(True, "connected")
        elif code == _REFUSED and self.refused_is_alive:
            self._end(True, "the host refuses, so it is there")
        else:
            self._end(False, os.strerror(code).lower())

    def _end(self, ok: bool, reason: str) -> None:
        self.timer[2] = None
        if self.sock is not None:
            self.loop.forget(self.sock)
            self.sock = None
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(ok, reason)


class _Echo:
    """An ICMP echo over a datagram or a raw socket, asked up to three times within the timeout: TCP
    sends a lost packet again by itself, ICMP does not, and a confirmation that one lost packet can
    make is none (S6). Costs no time: a device that is off takes the whole timeout either way."""

    TIMES = 3

    def __init__(  # called in one place
        self,
        loop: Loop,
        sock: socket.socket,
        where: Any,
        timeout_s: float,
        ended: Ended,
        *,
        raw: bool,
        v6: bool,
    ) -> None:
        self.loop, self.sock, self.raw, self.v6 = loop, sock, raw, v6
        self.ended: Ended | None = ended
        self.ident = os.getpid() & 0xFFFF
        self.token = os.urandom(16)
        self.timer = loop.later(
            timeout_s, lambda: self._end(False, f"no echo within {timeout_s:g} s")
        )
        kind = 128 if v6 else 8
        head = struct.pack("!BBHHH", kind, 0, 0, self.ident, 1)
        head = struct.pack("!BBHHH", kind, 0, checksum(head + self.token), self.ident, 1)
        self.packet, self.where = head + self.token, where
        try:
            sock.sendto(self.packet, where)
        except OSError as error:
            text = http.reason_of(error)
            loop.later(0, lambda: self._end(False, text))
        else:
            loop.watch(sock, READ, self._ready)
            for number in range(1, self.TIMES):
                loop.later(number * timeout_s / self.TIMES, self._again)

    def _again(self) -> None:
        if self.ended is not None:
            try:
                self.sock.sendto(self.packet, self.where)
            except OSError:
                pass

    def _ready(self, _mask: int) -> None:
        try:
            data = self.sock.recv(2048)
        except OSError as error:
            self._end(False, http.reason_of(error))
            return
        if self.raw and not self.v6:
            data = data[(data[0] & 15) * 4 :] if data else data
        # The token tells our echo from other agents' on the same host, and from our late ones.
        if len(data) >= 24 and data[0] == (129 if self.v6 else 0) and data[8:24] == self.token:
            self._end(True, "echo")

    def _end(self, ok: bool, reason: str) -> None:
        self.timer[2] = None
        self.loop.forget(self.sock)
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(ok, reason)


def _icmp(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Datagram socket, else raw socket, else TCP where neither is allowed."""
    try:
        family, _, _, _, where = http.resolve((address, spec.get("port") or 80))
    except (OSError, UnicodeError) as error:
        text = http.reason_of(error)
        loop.later(0, lambda: ended(False, text))
        return
    v6 = family == socket.AF_INET6
    proto = socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, proto)
        except OSError:
            continue
        raw = kind == socket.SOCK_RAW
        _Echo(loop, sock, where, spec["timeout_s"], ended, raw=raw, v6=v6)
        return
    port = spec.get("port") or 7
    _Tcp(loop, (address, port), spec["timeout_s"], ended, refused_is_alive=True)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return ~total & 0xFFFF
