"""Connects to the addresses of a name in the order of RFC 6724, which is the resolver's."""

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
"""Seconds without an answer after which the next address is tried as well (RFC 8305, 5)."""
MAX_ADDRESSES = 8
"""Maximum number of addresses of a name that are tried."""
_CONNECTING = (0, 11, 115)
"""connect() is done, would block or is in progress."""


def resolve(address: Address) -> list[tuple[int, SockAddr]]:
    """(family, socket address) for each address of (host, port), at most MAX_ADDRESSES.

    A name goes to the resolver and may block for its timeout; numeric addresses do not. Raises OSError
    and UnicodeError."""
    host, port = address
    # Bytes: for text Python would load its IDNA tables, at a cost of more than the agent's own code.
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    return [(family, where) for family, _, _, _, where in found[:MAX_ADDRESSES]]  # type: ignore[misc]  # IP only


class Turns:
    """Starts one attempt per address: the next one when an attempt has failed, or has not ended within
    STAGGER_S. Several may be under way at a time."""

    def __init__(
        self,
        loop: Loop,
        address: Address,
        timeout_s: float,
        begin: Callable[[int, SockAddr], None],
        over: Callable[[Exception, bool], None],
    ) -> None:
        """`begin(family, where)` starts an attempt, or raises OSError if it sent nothing. `over(error, sent)` is
        called once, when every attempt has failed. Neither is called before the loop runs. The timeout
        counts from the answer of the resolver: a caller with a timer of its own sets it after this."""
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
        # The resolver's time is not the device's: what it takes must not become a miss (S6).
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
        """Keep the first error, unless it is our own host's and this one is not: what another address of the
        same name answers says more about the device."""
        if self.error is None or (_is_local(self.error, self.sent) and not _is_local(error, sent)):
            self.error, self.sent = error, sent

    def failed(self, error: Exception) -> None:
        """One attempt has failed."""
        self._note(error, sent=True)
        self.running -= 1
        if self.left:
            self._next()
        else:
            self._end()

    def stop(self) -> None:
        """Start no further attempt, and call nothing any more."""
        self.left = []
        self.timer[2] = None
        self.begin = self.over = _nothing  # and so no cycle of references is left


def _nothing(*_given: object) -> None:
    pass


def _is_local(error: Exception, sent: bool) -> bool:
    return isinstance(outcome.rated(error, "", sent=sent), outcome.Unable)


class Dial:
    """A TCP connection to the first address that takes one."""

    def __init__(
        self,
        loop: Loop,
        address: Address,
        timeout_s: float,
        done: Callable[[socket.socket | None, Exception | None, bool], None],
    ) -> None:
        """`done(socket, None, True)` or `done(None, error, sent)`, once, and never after `cancel`; `sent` is
        whether a packet may have left this host. The timeout is the caller's to keep: it cancels. The socket is
        watched until it is watched anew."""
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
        """Close what is not connected yet; nothing is called any more."""
        self.done = _nothing
        self.turns.stop()
        for sock in self.open:
            self.loop.forget(sock)
        self.open = []
