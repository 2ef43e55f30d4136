"""A minimal HTTP/1.1 client and server, limited in bytes and time: http.client would need 7 MB per device."""

from __future__ import annotations

import os
import time

from watchdog_agent.runtime import outcome
from watchdog_agent.runtime.address import packed
from watchdog_agent.runtime.dial import Dial
from watchdog_agent.runtime.http_response import MAX_BODY, HttpError, Reader
from watchdog_agent.runtime.loop import NOTHING, READ, WRITE, between
from watchdog_agent.runtime.parsing import whole
from watchdog_agent.runtime.stdlib_light import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Address, Answer, Fetched

MAX_REQUEST = 4096
AGENT = "watchdog-agent"
"""User-Agent; some devices reject requests without one."""


class Url:
    """http://host[:port][/path], or https:// if `tls` allows it. Raises ValueError for anything
    else."""

    def __init__(
        self, text: str, default_port: int = 80, *, tls: bool = False, tls_port: int = 443
    ) -> None:
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in (("http", "https") if tls else ("http",)):
            raise ValueError(f"{text!r} is not an http:// address")
        self.secure = scheme == "https"
        place, _, path = rest.partition("/")
        host, _, port = (
            place.rpartition(":") if ":" in place.rpartition("]")[2] else (place, "", "")
        )
        # a zone is written as %25 in a URL (RFC 6874)
        self.host = (host or place).strip("[]").replace("%25", "%", 1)
        self.port = tls_port if self.secure else default_port
        if port:
            try:
                self.port = whole(port, 1, 65535)
            except ValueError:
                raise ValueError(f"{text!r} is not an http:// address") from None
        self.base = ("/" + path).rstrip("/")
        self.server_name = ""
        """The name in the server's certificate, if it differs from the host."""
        if not self.host or not 0 < self.port < 65536 or any(not "!" <= c <= "~" for c in text):
            raise ValueError(f"{text!r} is not an http:// address")
        self.host_header = host_header(self.host, self.port, secure=self.secure)


class HttpRequest:
    """One request over a new connection. `done(status, headers, body, reason)` is called exactly once, never after
    `cancel`; only a failed request has a reason, and it has no status."""

    def __init__(  # called in three places, and a value class would need memory
        self,
        loop: Loop,
        address: Address,
        request: bytes,
        timeout_s: float,
        done: Fetched,
        max_body: int = MAX_BODY,
    ) -> None:
        """`address`: (host, port); all addresses of a name are tried. `request`: all bytes to send."""
        self.loop = loop
        self.done: Fetched | None = done
        self.out = request
        self.reader = Reader(max_body)
        self.sock: socket.socket | None = None
        self.dial = Dial(loop, address, timeout_s, self._dialled)
        self.timer = loop.later(timeout_s, lambda: self._fail(f"no answer within {timeout_s:g} s"))

    def _dialled(self, sock: socket.socket | None, error: Exception | None, sent: bool) -> None:
        if sock is None:
            assert error is not None
            self._fail(reason_of(error, sent=sent))
            return
        self.sock = sock
        self.loop.watch(sock, WRITE, self._ready)

    def _ready(self, mask: int) -> None:
        try:
            if mask & WRITE:
                self._send()
            else:
                self._receive()
        except OSError as error:
            self._fail(reason_of(error))

    def _send(self) -> None:
        assert self.sock is not None
        sent = self.sock.send(self.out)
        self.out = self.out[sent:]
        if not self.out:
            self.loop.watch(self.sock, READ, self._ready)

    def _receive(self) -> None:
        assert self.sock is not None
        data = self.sock.recv(16384)
        try:
            answer = self.reader.feed(data)
        except HttpError as error:
            self._fail(str(error))
            return
        if answer is not None:
            self._end(*answer)

    def _end(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        done = self.done
        self.cancel()
        if done is not None:
            done(status, headers, body, "")

    def _fail(self, reason: str) -> None:
        done = self.done
        self.cancel()
        if done is not None:
            done(None, {}, b"", reason)

    def cancel(self) -> None:
        """Cancel the request; no callback is called afterwards."""
        self.done = None
        self.timer[2] = None
        self.dial.cancel()
        if self.sock is not None:
            self.loop.forget(self.sock)
            self.sock = None


def retry_after(headers: dict[str, str], most_s: float) -> float:
    """Seconds to wait according to Retry-After, at most about `most_s`, with jitter; 0 without one."""
    try:
        after = whole(headers.get("retry-after", ""))
    except ValueError:
        return 0.0
    return min(after, most_s) * between(1.0, 1.2)


def reason_of(error: Exception, *, sent: bool = True) -> str:
    """Describe an error without numbers that vary; an `outcome.Unable` if this host caused it.
    `sent`: whether a packet may have left this host."""
    # A TLS error: its errno is a number of the TLS library.
    if type(error).__module__ == "ssl":
        text = getattr(error, "verify_message", "") or getattr(error, "reason", None)
        text = f"TLS: {(text or str(error.args[-1])).replace('_', ' ').lower()}"
    elif isinstance(error, socket.gaierror):
        text = f"can't resolve its name: {str(error.args[-1]).lower()}"
    elif isinstance(error, OSError) and error.errno:
        text = os.strerror(error.errno).lower()
    else:
        text = str(error) or type(error).__name__
    return outcome.rated(error, text, sent=sent)


def host_header(host: str, port: int, *, secure: bool) -> str:
    """The Host header as browsers send it: without the zone, a trailing dot and the scheme's default port."""
    name = bare_host(host)
    if ":" in name:
        name = f"[{name}]"
    return name if port == (443 if secure else 80) else f"{name}:{port}"


def bare_host(host: str) -> str:
    """A host as the peer knows it: a zone is local to this host, and certificates have no trailing
    dot."""
    return host.partition("%")[0].removesuffix(".")


def request(
    method: str, path: str, host: str, body: bytes = b"", headers: Sequence[tuple[str, str]] = ()
) -> bytes:
    """Encode a request with `Connection: close`. `host`: as from `host_header`."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"User-Agent: {AGENT}", "Accept: */*"]
    lines.append("Connection: close")
    lines += [f"{name}: {value}" for name, value in headers]
    if body or method in ("POST", "PUT"):
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def fields(lines: list[bytes], name: bytes) -> list[bytes]:
    """The values of a header field in the lines of a request."""
    size = len(name) + 1
    return [one[size:] for one in lines if one[:size].lower() == name + b":"]


class Server:
    """Serves GET and POST without a body. Each connection gets one response within 5 s. At most 256 are open: the oldest
    one is closed for a new one once it is a second old; until then new ones wait.

    Rejects requests that a browser can be tricked into (DNS rebinding, cross-site forms): a Host header with a name that
    is not this host's, except for health checks, which reveal nothing, and POST requests from web pages."""

    MAX_CONNECTIONS = 256
    BACKLOG = 256
    TIMEOUT_S = 5.0
    MIN_S = 1.0
    PUBLIC = ("/healthz", "/ready")

    def __init__(
        self, loop: Loop, host: str, port: int, answer: Callable[[str, str, str], Answer | None]
    ) -> None:
        """`answer(path, accept, method)` returns (status, content type, body bytes), or None for 404. Raises
        OSError."""
        self.loop = loop
        self.answer = answer
        self.open: dict[socket.socket, list[Any]] = {}
        files = os.sysconf(
            "SC_OPEN_MAX"
        )  # the soft limit of this process; most of it is for probes
        self.most = (
            min(self.MAX_CONNECTIONS, max(8, files // 4)) if files > 0 else self.MAX_CONNECTIONS
        )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind((host, port))
        self.sock.listen(self.BACKLOG)
        own = os.uname().nodename.lower()
        self.names = ("localhost", host.lower(), own, own.partition(".")[0])
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self.sock.getsockname()[1]}"
        self._listen()

    def _listen(self) -> None:
        if self.sock.fileno() >= 0:
            self.loop.watch(self.sock, READ, self._accept)

    def _pause(self, seconds: float) -> None:
        """Accept no connection for this time; new ones wait in the kernel's queue."""
        self.loop.watch(self.sock, NOTHING, self._accept)
        self.loop.later(seconds, self._listen)

    def _accept(self, _mask: int) -> None:
        if len(self.open) >= self.most and not self._made_room():
            return
        try:
            # Like socket.accept, which `_socket` does not have.
            number, _ = self.sock._accept()  # type: ignore[attr-defined]  # noqa: SLF001
            sock = socket.socket(fileno=number)
        except OSError:  # the connection is gone, or there are no descriptors left
            if not self.open:
                self._pause(0.1)
            else:
                self._made_room()
            return
        sock.setblocking(False)
        timer = self.loop.later(self.TIMEOUT_S, lambda: self._close(sock))
        self.open[sock] = [timer, bytearray(), b""]
        self.loop.watch(sock, READ, lambda mask: self._ready(sock, mask))

    def _made_room(self) -> bool:
        """Close the oldest connection if it is old enough; otherwise pause accepting until it is."""
        oldest = next(iter(self.open))
        left_s: float = self.open[oldest][0][0] - time.monotonic() - self.TIMEOUT_S + self.MIN_S
        if left_s <= 0:
            self._close(oldest)
            return True
        self._pause(left_s)
        return False

    def _ready(self, sock: socket.socket, mask: int) -> None:
        state = self.open[sock]
        try:
            if mask & WRITE:
                state[2] = state[2][sock.send(state[2]) :]
                if not state[2]:
                    self._close(sock)
                return
            data = sock.recv(4096)
        except OSError:
            self._close(sock)
            return
        state[1] += data
        if not data or len(state[1]) > MAX_REQUEST:
            self._close(sock)
        elif b"\r\n\r\n" in state[1]:
            state[2] = self._reply(bytes(state[1]).split(b"\r\n\r\n", 1)[0].split(b"\r\n"))
            self.loop.watch(sock, WRITE, lambda again: self._ready(sock, again))

    def _reply(self, lines: list[bytes]) -> bytes:
        method, _, rest = lines[0].decode("latin-1").partition(" ")
        path, _, version = rest.partition(" ")
        path = path.partition("?")[0]
        answer = None
        if version[:5] == "HTTP/" and method in ("GET", "POST"):
            answer = self._foreign(method, path, lines)
            if answer is None:
                answer = self.answer(
                    path, b",".join(fields(lines, b"accept")).decode("latin-1"), method
                )
        status, kind, body = answer or (404, "text/plain", b"not found\n")
        words = {200: "OK", 404: "Not Found", 503: "Service Unavailable"}.get(status, "As Said")
        head = (
            f"HTTP/1.1 {status} {words}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body

    def _foreign(self, method: str, path: str, lines: list[bytes]) -> Answer | None:
        """The response to a request from another site's web page; None for other requests."""
        if method == "POST" and fields(lines, b"origin"):
            return 403, "text/plain", b"requests of web pages are refused\n"
        for one in fields(lines, b"host") if path not in self.PUBLIC else ():
            host = one.strip().decode("latin-1").lower()
            name = host[1:-1] if host[-1:] == "]" else host.rpartition(":")[0].strip("[]") or host
            if packed(name.partition("%")[0]) is None and name not in self.names:
                return 421, "text/plain", b"Host must be an address or a name of this host\n"
        return None

    def _close(self, sock: socket.socket) -> None:
        state = self.open.pop(sock, None)
        if state is not None:
            state[0][2] = None
            self.loop.forget(sock)

    def close(self) -> None:
        """Stop listening and close all connections."""
        for sock in list(self.open):
            self._close(sock)
        self.loop.forget(self.sock)
