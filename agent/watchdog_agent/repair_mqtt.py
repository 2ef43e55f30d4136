"""Publish one message to an MQTT 3.1.1 broker, at least once (QoS 1), so that its taking is known.

Sent in one piece: CONNECT, and after CONNACK a PUBLISH, and after PUBACK a DISCONNECT
(docs.oasis-open.org/mqtt/mqtt/v3.1.1). Nothing is read beyond those two answers.
"""

from __future__ import annotations

import os

from . import probe_mqtt
from .http import CONNECTING, reason_of, resolve
from .light import socket
from .loop import READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from .loop import Loop
    from .shapes import Document, Ended, Step

_CONNACK: Final = b"\x20\x02"
_PUBACK: Final = b"\x40\x02\x00\x01"


def start(loop: Loop, step: Step, _device: Document, ended: Ended) -> Publish:
    """Begin; `ended(ok, reason)` is called once, unless it is cancelled."""
    return Publish(loop, step, ended)


class Publish:
    """One message over one connection. The time-out is the caller's."""

    def __init__(self, loop: Loop, step: Step, ended: Ended) -> None:
        self.loop = loop
        self.ended: Ended | None = ended
        self.got = b""
        self.out = connect(step)
        self.then = publish(step["topic"], step["payload"])
        self.sock: socket.socket | None = None
        try:
            family, kind, proto, _, where = resolve(step["broker_at"])
            self.sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, proto)
            code = self.sock.connect_ex(where)
            text = "" if code in CONNECTING else os.strerror(code).lower()
        except (OSError, UnicodeError) as error:
            text = reason_of(error)
        if self.sock is not None and not text:
            loop.watch(self.sock, WRITE, self._ready)
        else:
            loop.later(0, lambda: self._end(False, text))

    def _ready(self, mask: int) -> None:
        assert self.sock is not None
        try:
            if mask & WRITE:
                code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    self._end(False, os.strerror(code).lower())
                    return
                self.out = self.out[self.sock.send(self.out) :]
                if not self.out:
                    self.loop.watch(self.sock, READ, self._ready)
                return
            data = self.sock.recv(64)
        except OSError as error:
            self._end(False, reason_of(error))
            return
        self.got += data
        if len(self.got) >= 4:
            self._answered(self.got[:4])
        elif not data:
            self._end(False, "the broker closed the connection")

    def _answered(self, answer: bytes) -> None:
        assert self.sock is not None
        if self.then:
            code = answer[3]
            if answer[:2] != _CONNACK or code:
                known = answer[:2] == _CONNACK and code in probe_mqtt.REFUSED
                why = probe_mqtt.REFUSED[code] if known else "its answer is not MQTT"
                self._end(False, f"the broker refuses: {why}")
                return
            self.out, self.then, self.got = self.then, b"", b""
            self.loop.watch(self.sock, WRITE, self._ready)
        elif answer == _PUBACK:
            try:
                self.sock.send(probe_mqtt.DISCONNECT)
            except OSError:
                pass  # the message is taken all the same
            self._end(True, "published")
        else:
            self._end(False, "the broker did not take the message")

    def _end(self, ok: bool, reason: str) -> None:
        ended = self.ended
        self.cancel()
        if ended is not None:
            ended(ok, reason)

    def hurry(self) -> None:
        """It is as fast as it can be."""

    def cancel(self) -> None:
        """Give up; nobody is told."""
        self.ended = None
        if self.sock is not None:
            self.loop.forget(self.sock)
            self.sock = None


def connect(step: Step) -> bytes:
    """CONNECT with a clean session, and a user and password where there are any. Raises OSError."""
    user, file = step.get("user") or None, step.get("password_file", "")
    password = probe_mqtt.secret(file) if user and file else None
    return probe_mqtt.connect(f"wd{os.urandom(8).hex()}", user, password)


def publish(topic: str, payload: str) -> bytes:
    """PUBLISH number 1 with QoS 1."""
    body = probe_mqtt.field(topic.encode()) + b"\x00\x01" + payload.encode()
    return b"\x32" + probe_mqtt.length(len(body)) + body
