"""A question in one UDP packet, asked up to three times within the time-out."""

from __future__ import annotations

from . import http
from .light import socket
from .loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop
    from .shapes import Address, Ended

TIMES = 3
"""Nobody sends a lost packet again but we, and one lost packet is no evidence (S6)."""
MOST = 4096
"""Bytes of an answer that are looked at."""


class Ask:
    """`judge(answer)` gives (ok, reason), or None for a packet that answers something else."""

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
        self.sock: socket.socket | None = None
        self.timer = loop.later(
            timeout_s, lambda: self._end(False, f"no answer within {timeout_s:g} s")
        )
        try:
            family, _, _, _, where = http.resolve(address)
            self.sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            # Connected: the kernel passes over packets from anybody else, and says when it is refused.
            self.sock.connect(where)
            self.sock.send(packet)
        except (OSError, UnicodeError) as error:
            text = http.reason_of(error)
            loop.later(0, lambda: self._end(False, text))
            return
        loop.watch(self.sock, READ, self._ready)
        for number in range(1, TIMES):
            loop.later(number * timeout_s / TIMES, self._again)

    def _again(self) -> None:
        if self.sock is not None:
            try:
                self.sock.send(self.packet)
            except OSError:
                pass

    def _ready(self, _mask: int) -> None:
        assert self.sock is not None
        try:
            data = self.sock.recv(MOST)
        except OSError as error:
            self._end(False, http.reason_of(error))
            return
        judged = self.judge(data)
        if judged is not None:
            self._end(*judged)

    def _end(self, ok: bool, reason: str) -> None:  # as Ended
        self.timer[2] = None
        if self.sock is not None:
            self.loop.forget(self.sock)
            self.sock = None
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(ok, reason)
