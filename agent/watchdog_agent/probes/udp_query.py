"""A query in one UDP packet, sent up to three times within the timeout, to each address of a name."""

from __future__ import annotations

from watchdog_agent.runtime import http
from watchdog_agent.runtime.dial import Turns
from watchdog_agent.runtime.loop import READ
from watchdog_agent.runtime.stdlib_light import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Address, Ended, SockAddr

TIMES = 3
"""Number of tries. UDP does not retransmit, and one lost packet is not evidence (S6)."""
MAX_BYTES = 4096
"""Maximum number of bytes read from an answer."""


class UdpQuery:
    """One query. `judge(answer)` returns (ok, reason), or None for a packet that does not belong to it."""

    def __init__(
        self,
        loop: Loop,
        address: Address,
        packet: bytes,
        timeout_s: float,
        judge: Callable[[bytes], tuple[bool, str] | None],
        ended: Ended,
    ) -> None:
        self.loop, self.packet, self.judge = loop, packet, judge
        self.ended: Ended | None = ended
        self.socks: list[socket.socket] = []
        """One per queried address."""
        self.turns = Turns(loop, address, timeout_s, self._begin, self._failed)
        self.timer = loop.later(
            timeout_s, lambda: self._end(False, f"no answer within {timeout_s:g} s")
        )
        for number in range(1, TIMES):
            loop.later(number * timeout_s / TIMES, self._again)

    def _begin(self, family: int, where: SockAddr) -> None:
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            # Connected, so that the kernel drops packets from other senders and reports refusals.
            sock.connect(where)
            sock.send(self.packet)
        except OSError:
            sock.close()
            raise
        self.socks.append(sock)
        self.loop.watch(sock, READ, lambda _mask: self._ready(sock))

    def _failed(self, error: Exception, sent: bool) -> None:
        self._end(False, http.reason_of(error, sent=sent))

    def _again(self) -> None:
        for sock in self.socks:
            try:
                sock.send(self.packet)
            except OSError:
                pass

    def _ready(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(MAX_BYTES)
        except OSError as error:
            self.socks.remove(sock)
            self.loop.forget(sock)
            self.turns.failed(error)
            return
        judged = self.judge(data)
        if judged is not None:
            self._end(*judged)

    def _end(self, ok: bool, reason: str) -> None:  # as Ended
        self.timer[2] = None
        self.turns.stop()
        for sock in self.socks:
            self.loop.forget(sock)
        self.socks = []
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(ok, reason)
