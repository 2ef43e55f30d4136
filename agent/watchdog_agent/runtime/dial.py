"""Connects to the addresses of a name in the resolver's order (RFC 6724)."""

from __future__ import annotations

import time

from watchdog_agent.runtime import outcome
from watchdog_agent.runtime.loop import WRITE
from watchdog_agent.runtime.stdlib_light import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Address, SockAddr

STAGGER_S = 0.25
"""Seconds without an answer after which the next address is tried too (RFC 8305, 5)."""
MAX_ADDRESSES = 8
"""Maximum number of addresses of a name that are tried."""
_CONNECTING = (0, 11, 115)
"""Results of connect(): connected, would block, or in progress."""


def resolve(address: Address) -> list[tuple[int, SockAddr]]:
    """(family, socket address) for each address of (host, port), at most MAX_ADDRESSES.

    A name is resolved, which may block for the resolver's timeout; numeric addresses do not. Raises OSError
    and UnicodeError."""
    host, port = address
    # Bytes: for text Python would load its IDNA tables, which need more memory than the agent's own code.
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    return [(family, where) for family, _, _, _, where in found[:MAX_ADDRESSES]]  # type: ignore[misc]  # IP only


class Turns:
    """Starts one attempt per address: the next one when an attempt fails, or has not ended within
    STAGGER_S. Several attempts may be in progress."""

    def __init__(
        self,
        loop: Loop,
        address: Address,
        timeout_s: float,
        begin: Callable[[int, SockAddr], None],
        over: Callable[[Exception, bool], None],
    ) -> None:
        """`begin(family, where)` starts an attempt, or raises OSError if it sent nothing. `over(error, sent)` is
        called once, when all attempts have failed. Neither is called before the loop runs. The timeout
        starts after name resolution: a caller with its own timer must set it after this call."""
        self.loop, self.begin, self.over = loop, begin, over
        self.running = 0
        self.error: Exception | None = None
        self.sent = False
        """Whether a packet may have left this host before that error."""
        self.left: list[tuple[int, SockAddr]] = []
        try:
            self.left = resolve(address)
        except (OSError, UnicodeError) as error:
            self.error = error
        # Exclude name resolution, because a slow resolver must not cause a miss (S6).
        self.ends = time.monotonic() + timeout_s
        self.stagger_s = min(STAGGER_S, timeout_s / (len(self.left) + 1))
        self.timer = loop.later(0, self._next)

    def remaining_s(self) -> float:
        """Seconds until the timeout."""
        return self.ends - time.monotonic()

    def _next(self) -> None:
        self.timer[2] = None
        while self.left and self.remaining_s() > 0:
            family, where = self.left.pop(0)
            try:
                self.begin(family, where)
            except OSError as error:
                self._note(error, sent=False)
                continue
            self.running += 1
            if self.left:
                self.timer = self.loop.later(self.stagger_s, self._next)
            return
        self.left = []
        self._end()

    def _end(self) -> None:
        if not self.running:
            self.over(self.error or OSError("the name has no address"), self.sent)

    def _note(self, error: Exception, *, sent: bool) -> None:
        """Keep the first error, but replace a local one by one that is not local: the answer of another address of
        the same name says more about the device."""
        if self.error is None or (_is_local(self.error, self.sent) and not _is_local(error, sent)):
            self.error, self.sent = error, sent

    def failed(self, error: Exception) -> None:
        """Record that one attempt has failed."""
        self._note(error, sent=True)
        self.running -= 1
        if self.left:
            self._next()
        else:
            self._end()

    def stop(self) -> None:
        """Start no further attempt; no callback is called afterwards."""
        self.left = []
        self.timer[2] = None
        self.begin = self.over = _nothing  # also breaks the reference cycle


def _nothing(*_given: object) -> None:
    pass


def _is_local(error: Exception, sent: bool) -> bool:
    return isinstance(outcome.rated(error, "", sent=sent), outcome.Unable)


class Dial:
    """A TCP connection to the first address that accepts it."""

    def __init__(
        self,
        loop: Loop,
        address: Address,
        timeout_s: float,
        done: Callable[[socket.socket | None, Exception | None, bool], None],
    ) -> None:
        """`done(socket, None, True)` or `done(None, error, sent)` is called once, never after `cancel`; `sent`: whether a
        packet may have left this host. The caller enforces the timeout by `cancel`. The loop watches the socket until
        the caller watches it again."""
        self.loop, self.done = loop, done
        self.open: list[socket.socket] = []
        self.turns = Turns(loop, address, timeout_s, self._begin, self._over)

    def _over(self, error: Exception, sent: bool) -> None:
        self.done(None, error, sent)

    def _begin(self, family: int, where: SockAddr) -> None:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        code = sock.connect_ex(where)
        if code not in _CONNECTING:
            sock.close()
            raise OSError(code, "")
        self.open.append(sock)
        self.loop.watch(sock, WRITE, lambda _mask: self._ready(sock))

    def _ready(self, sock: socket.socket) -> None:
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.open.remove(sock)
        if code:
            self.loop.forget(sock)
            self.turns.failed(OSError(code, ""))
            return
        done = self.done
        self.cancel()
        done(sock, None, True)

    def cancel(self) -> None:
        """Close connections in progress; no callback is called afterwards."""
        self.done = _nothing
        self.turns.stop()
        for sock in self.open:
            self.loop.forget(sock)
        self.open = []
