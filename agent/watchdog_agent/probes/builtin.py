"""Probes of the device; none of them blocks. TCP, HTTP and ICMP are here, the other kinds in their own
modules, which are loaded only if configured.

Each probe calls its callback `done(outcome, reason, took_s, warning)` exactly once, at the latest when its timeout
expires.
"""

from __future__ import annotations

import os
import sys
import time

from watchdog_agent import errors
from watchdog_agent.config import probes
from watchdog_agent.runtime import http, http_response, outcome
from watchdog_agent.runtime.dial import Dial, Turns
from watchdog_agent.runtime.loop import READ
from watchdog_agent.runtime.stdlib_light import socket, struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Address, Ended, Fetched, Probe, Probed, SockAddr, Timer

_REFUSED = 111
_FORBIDDEN = (1, 13, 93, 94)
"""EPERM, EACCES, EPROTONOSUPPORT, ESOCKTNOSUPPORT: this kind of socket is not available."""


def start(loop: Loop, spec: Probe, address: str, done: Probed) -> None:
    """Start the probe that `spec` (a checked probe of the configuration) describes."""
    began = time.monotonic()

    def ended(ok: bool, reason: str, warning: str = "") -> None:
        done(outcome.of(ok, reason), reason, time.monotonic() - began, warning)

    try:
        _start(loop, spec, address, ended)
        began = time.monotonic()  # do not count a slow resolver against the device
    except (OSError, errors.ConfigError) as error:
        # Such as EMFILE, or a certificate file that cannot be read.
        text = str(error) if isinstance(error, errors.ConfigError) else http.reason_of(error)
        loop.later(0, lambda: ended(False, outcome.Unable(text)))


def _start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    kind = spec["kind"]
    if kind == "http":
        _http(loop, spec, address, ended)
    elif kind == "tcp":
        _Tcp(loop, (address, spec["port"]), spec["timeout_s"], ended, refused_is_alive=False)
    elif kind in probes.MODULES:
        probes.module_of(kind).start(loop, spec, address, ended)
    else:
        _Ping(loop, spec, address, ended)


def close() -> None:
    """Stop started programs that would outlive this process."""
    module = sys.modules.get("watchdog_agent.probes.command")
    if module is not None:
        module.close()


def _http(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    http_probe(loop, spec, address, ended, _plain)


def _plain(
    loop: Loop, place: Address, data: bytes, spec: Probe, answered: Fetched, max_body: int
) -> None:
    http.HttpRequest(loop, place, data, spec["timeout_s"], answered, max_body)


def http_probe(
    loop: Loop, spec: Probe, address: str, ended: Ended, fetch: Callable[..., None]
) -> None:
    """Send a GET and evaluate the response. A redirect is not followed: its status is evaluated like any other."""

    def answered(status: int | None, _headers: dict[str, str], body: bytes, reason: str) -> None:
        if status is None:
            ended(False, reason)
        else:
            ended(*judge_http(spec, status, body))

    host = http.host_header(address, spec["port"], secure=spec["kind"] == "https")
    data = http.request("GET", spec.get("path", "/"), host)
    most = 0
    if spec.get("expect_body"):
        most = http_response.MAX_BODY
    fetch(loop, (address, spec["port"]), data, spec, answered, most)


def judge_http(spec: Probe, status: int, body: bytes) -> tuple[bool, str]:
    """Compare status and body with the expectations; return (ok, reason)."""
    wanted = spec.get("expect_status", 200)
    if status not in (wanted if isinstance(wanted, list) else [wanted]):
        shown = " or ".join(map(str, wanted)) if isinstance(wanted, list) else wanted
        return False, f"status {status}, not {shown}"
    text = spec.get("expect_body")
    if text and text.encode() not in body:
        return False, f"status {status}, but {text[:60]!r} is not in its first 64 KiB"
    return True, f"status {status}"


class _Tcp:
    """A connection attempt. `refused_is_alive`: a refusal counts as success, because it shows reachability."""

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
        self.timeout_s = timeout_s
        self.dial = Dial(loop, address, timeout_s, self._dialled)
        self.timer = loop.later(timeout_s, self._late)

    def _dialled(self, sock: socket.socket | None, error: Exception | None, sent: bool) -> None:
        if sock is not None:
            self.loop.forget(sock)
            self._end(True, "connected")
        elif self._is_refusal(error):
            self._end(True, "the host refuses, so it is there")
        else:
            assert error is not None
            self._end(False, http.reason_of(error, sent=sent))

    def _late(self) -> None:
        # Another address of the same name may not have answered.
        if self._is_refusal(self.dial.turns.error):
            self._end(True, "the host refuses, so it is there")
        else:
            self._end(False, f"no answer within {self.timeout_s:g} s")

    def _is_refusal(self, error: Exception | None) -> bool:
        return self.refused_is_alive and getattr(error, "errno", None) == _REFUSED

    def _end(self, ok: bool, reason: str) -> None:
        self.timer[2] = None
        self.dial.cancel()
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(ok, reason)


class _Echo:
    """An ICMP echo over a datagram or a raw socket, sent up to three times within the timeout. Unlike TCP, ICMP does
    not retransmit, and a confirmation that one lost packet can cause is not evidence (S6). No extra time: a device
    that is off takes the whole timeout either way."""

    TIMES = 3

    def __init__(  # called in one place
        self,
        loop: Loop,
        sock: socket.socket,
        where: SockAddr,
        timeout_s: float,
        ended: Ended,
        *,
        raw: bool,
        within_s: float,
    ) -> None:
        self.loop, self.sock, self.raw = loop, sock, raw
        self.v6 = v6 = sock.family == socket.AF_INET6
        self.ended: Ended | None = ended
        self.ident = os.getpid() & 0xFFFF
        self.token = os.urandom(16)
        self.timer = loop.later(
            timeout_s, lambda: self._end(False, f"no echo within {within_s:g} s")
        )
        kind = 128 if v6 else 8
        head = struct.pack("!BBHHH", kind, 0, 0, self.ident, 1)
        head = struct.pack("!BBHHH", kind, 0, checksum(head + self.token), self.ident, 1)
        self.packet, self.where = head + self.token, where
        self.again: list[Timer] = []
        try:
            sock.sendto(self.packet, where)
        except OSError:
            self.cancel()
            raise
        loop.watch(sock, READ, self._ready)
        for number in range(1, self.TIMES):
            self.again.append(loop.later(number * timeout_s / self.TIMES, self._again))

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
        # The token distinguishes this echo from those of other agents on the host, and from late ones.
        if len(data) >= 24 and data[0] == (129 if self.v6 else 0) and data[8:24] == self.token:
            self._end(True, "echo")

    def _end(self, ok: bool, reason: str) -> None:
        ended = self.ended
        self.cancel()
        if ended is not None:
            ended(ok, reason)

    def cancel(self) -> None:
        """Cancel it; no callback is called afterwards."""
        self.ended = None
        for timer in (self.timer, *self.again):
            timer[2] = None
        self.loop.forget(self.sock)


class _Ping:
    """An echo from any address of the device. If this process may not open an ICMP socket, TCP is used instead and
    gives the probe its name (`spec["instead"]`)."""

    def __init__(self, loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
        self.loop, self.spec, self.address, self.ended = loop, spec, address, ended
        self.asked: list[_Echo] = []
        self.denied = False
        # Port 0: a raw IPv6 socket accepts no other (raw(7)).
        self.turns = Turns(loop, (address, 0), spec["timeout_s"], self._begin, self._over)

    def _begin(self, family: int, where: SockAddr) -> None:
        try:
            sock, raw = echo_socket(family)
        except OSError as error:
            self.denied = self.denied or error.errno in _FORBIDDEN
            raise
        self.spec.pop("instead", None)
        left_s, within_s = max(0.0, self.turns.remaining_s()), self.spec["timeout_s"]
        echo = _Echo(self.loop, sock, where, left_s, self._answered, raw=raw, within_s=within_s)
        self.asked.append(echo)

    def _answered(self, ok: bool, reason: str, _warning: str = "") -> None:  # as Ended
        if not ok:
            unable = isinstance(reason, outcome.Unable)
            self.turns.failed((OSError if unable else TimeoutError)(reason))
            return
        self.turns.stop()
        for echo in self.asked:
            echo.cancel()
        self.ended(ok, reason)

    def _over(self, error: Exception, sent: bool) -> None:
        self.turns.stop()
        if not self.denied or self.asked:
            self.ended(False, http.reason_of(error, sent=sent))
            return
        port = self.spec["instead"] = self.spec.get("port") or 7
        place, timeout_s = (self.address, port), self.spec["timeout_s"]
        _Tcp(self.loop, place, timeout_s, self._asked_tcp, refused_is_alive=True)

    def _asked_tcp(self, ok: bool, reason: str, _warning: str = "") -> None:  # as Ended
        text = f"{reason} (the agent has no right to ping)"
        self.ended(ok, type(reason)(text))


def echo_socket(family: int) -> tuple[socket.socket, bool]:
    """A socket for ICMP echoes, and whether it is raw: a datagram socket if the kernel allows it
    (net.ipv4.ping_group_range, for both IP versions). Raises OSError."""
    proto = socket.IPPROTO_ICMPV6 if family == socket.AF_INET6 else socket.IPPROTO_ICMP
    try:
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        return socket.socket(family, kind, proto), False
    except OSError:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        return socket.socket(family, kind, proto), True


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return ~total & 0xFFFF
