"""Wake a device by a magic packet: six times ff, sixteen times its address, over UDP."""

from __future__ import annotations

from .http import reason_of
from .light import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loop import Loop
    from .shapes import Document, Ended, Step


def start(loop: Loop, step: Step, _device: Document, ended: Ended) -> Packet:
    """Begin; `ended(ok, reason)` is called once, unless it is cancelled."""
    return Packet(loop, step, ended)


class Packet:
    """One packet. That it was sent is all that can be known of it."""

    def __init__(self, loop: Loop, step: Step, ended: Ended) -> None:
        host, port = step["to_at"]
        ok, reason = True, "sent"
        try:
            family, _, _, _, where = socket.getaddrinfo(
                host.encode("ascii"), port, type=socket.SOCK_DGRAM
            )[0]
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                if family == socket.AF_INET:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                sock.sendto(magic(step["mac"]), where)
            finally:
                sock.close()
        except (OSError, UnicodeError) as error:
            ok, reason = False, reason_of(error)
        self.timer = loop.later(0, lambda: ended(ok, reason))

    def hurry(self) -> None:
        """It has been sent."""

    def cancel(self) -> None:
        """Nobody is told."""
        self.timer[2] = None


def magic(mac: str) -> bytes:
    """The packet for aa:bb:cc:dd:ee:ff."""
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) * 16
