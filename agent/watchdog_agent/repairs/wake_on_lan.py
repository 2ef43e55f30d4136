"""Wakes a device by a magic packet over UDP: six bytes ff, then its MAC address sixteen times."""

from __future__ import annotations

from watchdog_agent.runtime.dial import resolve
from watchdog_agent.runtime.http import reason_of
from watchdog_agent.runtime.stdlib_light import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Ended, SockAddr, Step


def start(loop: Loop, step: Step, _device: dict[str, str], ended: Ended) -> Packet:
    """Start it; `ended(ok, reason)` is called once, unless it is cancelled."""
    return Packet(loop, step, ended)


class Packet:
    """One packet to each address of the name. Only its sending can be verified."""

    def __init__(self, loop: Loop, step: Step, ended: Ended) -> None:
        host, port = step["to_at"]
        reason = ""
        try:
            places = resolve((host, port))
        except (OSError, UnicodeError) as error:
            places, reason = [], reason_of(error)
        ok = False
        for family, where in places:
            try:
                send(magic(step["mac"]), family, where)
            except OSError as error:
                reason = reason if ok else reason_of(error)
            else:
                ok, reason = True, "sent"
        self.timer = loop.later(0, lambda: ended(ok, reason))

    def finish_soon(self) -> None:
        """No-op: it has already been sent."""

    def cancel(self) -> None:
        """Cancel it without a result."""
        self.timer[2] = None


def send(packet: bytes, family: int, where: SockAddr) -> None:
    """Send one datagram, which may be a broadcast. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.sendto(packet, where)
    finally:
        sock.close()


def magic(mac: str) -> bytes:
    """The magic packet for aa:bb:cc:dd:ee:ff."""
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) * 16
