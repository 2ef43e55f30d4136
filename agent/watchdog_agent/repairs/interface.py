"""Cycles a network interface by rtnetlink: down, a pause, up, then restore what the kernel removed.

The kernel answers a netlink request within the call that sends it, so nothing waits here; the
sockets do not block, and a missing answer is an error. Taking an interface down removes its static
routes and its IPv6 addresses: they are read first, stored with the attempt, and restored afterwards.

Messages: linux/netlink.h, linux/rtnetlink.h; rtnetlink(7).
"""

from __future__ import annotations

import binascii
import errno
import os

from watchdog_agent.runtime.stdlib_light import socket, struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final, Literal

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Ended, Step, Undo

HOLD_S: Final = 1.0
"""How long the link stays down, in seconds: a switch and a device at the other end must notice."""
MAX_KEPT: Final = 128
"""Maximum number of routes and addresses that are restored."""

_ROUTE: Final = 0  # NETLINK_ROUTE
_ERROR, _DONE = 2, 3
_NEW_LINK, _NEW_ADDRESS, _GET_ADDRESS, _NEW_ROUTE, _GET_ROUTE = 16, 20, 22, 24, 26
_REQUEST, _ACK, _DUMP, _CREATE_NEW = 1, 4, 0x300, 0x600
_UP: Final = 1  # IFF_UP
_HEAD: Final = struct.Struct("=IHHII")
_LINK: Final = struct.Struct("=BxHiII")
_PERMANENT: Final = 0x80  # IFA_F_PERMANENT
_CLONED: Final = 0x200  # RTM_F_CLONED
_ASKED: Final = 6  # RTNH_F_PERVASIVE, RTNH_F_ONLINK: the flags that can be requested
_LOCAL_TABLE: Final = 255
_OF_KERNEL: Final = (2, 9)  # RTPROT_KERNEL, RTPROT_RA: restored by the kernel itself
_OIF: Final = 4  # RTA_OIF


def prepare(step: Step) -> Undo:
    """The data needed to undo the step, to be stored before it is taken. Raises OSError."""
    index = socket.if_nametoindex(step["interface"])
    kept = [*_addresses(index), *_routes(index)]
    return {
        "kind": "interface",
        "interface": step["interface"],
        "kept": [binascii.b2a_base64(one, newline=False).decode() for one in kept[:MAX_KEPT]],
    }


def start(loop: Loop, step: Step, undo: Undo, ended: Ended) -> Cycle:
    """Start it; `ended(ok, reason)` is called once, unless it is cancelled."""
    return Cycle(loop, step, undo, ended)


class Cycle:
    """One cycle of an interface."""

    def __init__(self, loop: Loop, step: Step, undo: Undo, ended: Ended) -> None:
        self.undo = undo
        self.ended: Ended | None = ended
        self.clean = True
        """Whether there is nothing to undo."""
        try:
            _link(socket.if_nametoindex(step["interface"]), up=False)
        except OSError as error:
            text = _reason(error)
            self.timer = loop.later(0, lambda: self._end(False, f"can't be taken down: {text}"))
        else:
            self.clean = False
            hold_s = min(HOLD_S, step["timeout_s"] / 2)
            self.timer = loop.later(hold_s, self.finish_soon)

    def finish_soon(self) -> None:
        """Bring the interface up now."""
        if self.ended is None:
            return
        try:
            lost = restore(self.undo)
        except OSError as error:
            self._end(False, f"can't be put up: {_reason(error)}")
        else:
            self.clean = True
            self._end(True, f"cycled; {lost} routes are lost" if lost else "cycled")

    def cancel(self) -> None:
        """Bring the interface up, without a result."""
        if self.ended is not None:
            self.ended = None
            self.timer[2] = None
            if not self.clean:
                restore(self.undo)
                self.clean = True

    def _end(self, ok: bool, reason: str) -> None:
        self.timer[2] = None
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(ok, reason)


def restore(undo: Undo) -> int:
    """Bring the interface up and restore what was lost with it; return the number of entries that could not be
    restored. Idempotent. Raises OSError if the interface cannot be brought up."""
    _link(socket.if_nametoindex(undo["interface"]), up=True)
    missing = [binascii.a2b_base64(one) for one in undo["kept"]]
    # A route to a gateway may come after the routes that need it: a second round adds those.
    for _ in range(2):
        missing = [one for one in missing if not _put_back(one)]
    return len(missing)


def _put_back(kept: bytes) -> bool:
    kind = int.from_bytes(kept[:2], "little")
    try:
        for _ in _ask(kind, _REQUEST | _ACK | _CREATE_NEW, kept[2:]):
            pass
    except OSError as error:
        return error.errno == errno.EEXIST
    return True


def _link(index: int, *, up: bool) -> None:
    body = _LINK.pack(socket.AF_UNSPEC, 0, index, _UP if up else 0, _UP)
    for _ in _ask(_NEW_LINK, _REQUEST | _ACK, body):
        pass


def _addresses(index: int) -> Iterator[bytes]:
    """The static IPv6 addresses; IPv4 addresses are not removed."""
    ask = struct.pack("=BBBBI", socket.AF_INET6, 0, 0, 0, 0)
    for body in _ask(_GET_ADDRESS, _REQUEST | _DUMP, ask):
        _, _, flags, scope, owner = struct.unpack_from("=BBBBI", body)
        if owner == index and flags & _PERMANENT and scope == 0:
            yield _NEW_ADDRESS.to_bytes(2, "little") + body


def _routes(index: int) -> Iterator[bytes]:
    """The configured routes over the interface."""
    for family in (socket.AF_INET, socket.AF_INET6):
        ask = struct.pack("=BBBBBBBBI", family, *[0] * 8)
        for body in _ask(_GET_ROUTE, _REQUEST | _DUMP, ask):
            _, _, _, _, table, protocol, _, _, flags = struct.unpack_from("=BBBBBBBBI", body)
            ours = _attribute(body[12:], _OIF) == index.to_bytes(4, _ORDER)
            if (
                ours
                and table != _LOCAL_TABLE
                and protocol not in _OF_KERNEL
                and not flags & _CLONED
            ):
                # The kernel rejects routes that are marked as dead or whose link is down.
                message = body[:8] + (flags & _ASKED).to_bytes(4, _ORDER) + body[12:]
                yield _NEW_ROUTE.to_bytes(2, "little") + message


_ORDER: Literal["little", "big"] = "little" if struct.pack("=H", 1) == b"\1\0" else "big"


def _attribute(data: bytes, wanted: int) -> bytes:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4 or length > len(data):
            break
        if kind & 0x3FFF == wanted:
            return data[4:length]
        data = data[(length + 3) & ~3 :]
    return b""


def _ask(kind: int, flags: int, body: bytes) -> Iterator[bytes]:
    """Send one request; yield the bodies of the answers. Raises OSError with the kernel's errno."""
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, _ROUTE
    )
    try:
        sock.bind((0, 0))
        sock.sendto(_HEAD.pack(_HEAD.size + len(body), kind, flags, 1, 0) + body, (0, 0))
        for answer, found in _messages(sock):
            if answer == _DONE:
                return
            if answer == _ERROR:
                if code := -int.from_bytes(found[:4], _ORDER, signed=True):
                    raise OSError(code, os.strerror(code))
                return
            yield found
    finally:
        sock.close()


def _messages(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    """(type, body) of each message that the kernel sends. Raises OSError."""
    while True:
        data = sock.recv(65536)
        while len(data) >= _HEAD.size:
            length, answer, _, _, _ = _HEAD.unpack_from(data)
            if not _HEAD.size <= length <= len(data):
                raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
            yield answer, data[_HEAD.size : length]
            data = data[(length + 3) & ~3 :]


def _reason(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)
