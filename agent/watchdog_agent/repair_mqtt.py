"""Publish one message to an MQTT 3.1.1 broker, at least once (QoS 1), so that its taking is known.

CONNECT, and after CONNACK a PUBLISH, and after PUBACK a DISCONNECT
(docs.oasis-open.org/mqtt/mqtt/v3.1.1). Nothing is read beyond those two answers. With `tls` the handshake
comes before it: `repair_mqtt_tls`, which is loaded only then.
"""

from __future__ import annotations

import os

from . import http, probe_mqtt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from .loop import Loop
    from .shapes import Document, Ended, Step

_PUBACK: Final = b"\x40\x02\x00\x01"
PUBLISHED: Final = -1
"""The status of a message that the broker has taken; others are codes of CONNACK."""


def start(loop: Loop, step: Step, _device: Document, ended: Ended) -> Run:
    """Begin; `ended(ok, reason)` is called once, unless it is cancelled. Raises OSError."""
    return Run(loop, step, ended)


class Run:
    """One message over one connection."""

    def __init__(self, loop: Loop, step: Step, ended: Ended) -> None:
        self.ended: Ended | None = ended
        # The time-out is the caller's; this one is only never shorter.
        place, packet, wait_s = step["broker_at"], connect(step), step["timeout_s"] + 1.0
        if step.get("tls"):
            from . import repair_mqtt_tls

            self.fetch: http.Fetch = repair_mqtt_tls.begin(
                loop, place, packet, step, wait_s, self._answered
            )
        else:
            self.fetch = Publish(loop, place, packet, wait_s, self._answered)
            self.fetch.message = publish(step["topic"], step["payload"])

    def _answered(self, status: int | None, _headers: dict[str, str], body: Any) -> None:
        if self.ended is None:
            return
        if status == PUBLISHED:
            self.ended(True, "published")
        elif status is None:
            self.ended(False, f"the broker: {body}")
        else:
            why = probe_mqtt.REFUSED.get(status, f"code {status}")
            self.ended(False, f"the broker refuses: {why}")

    def hurry(self) -> None:
        """It is as fast as it can be."""

    def cancel(self) -> None:
        """Give up; nobody is told."""
        self.ended = None
        self.fetch.cancel()


class Publish(probe_mqtt.Dialogue):
    """Goes on after CONNACK: its answer is PUBACK."""

    message = b""

    def _connected(self) -> None:
        assert self.sock is not None
        message, self.message, self.got = self.message, b"", bytearray()
        # A fresh connection takes so little in one piece.
        if self.sock.send(message) < len(message):
            self._end(None, "it does not take what we send")

    def _receive(self) -> None:
        if self.message:
            super()._receive()
            return
        assert self.sock is not None
        data = self.sock.recv(64)
        self.got += data
        if len(self.got) >= 4 and self.got[:4] == _PUBACK:
            try:
                self.sock.send(probe_mqtt.DISCONNECT)
            except OSError:
                pass  # the message is taken all the same
            self._end(PUBLISHED, {})
        elif len(self.got) >= 4:
            self._end(None, "it did not take the message")
        elif not data:
            self._end(None, "it closed the connection without an answer")


def connect(step: Step) -> bytes:
    """CONNECT with a clean session, and a user and password where there are any. Raises OSError."""
    user, file = step.get("user") or None, step.get("password_file", "")
    password = probe_mqtt.secret(file) if user and file else None
    return probe_mqtt.connect(f"wd{os.urandom(8).hex()}", user, password)


def publish(topic: str, payload: str) -> bytes:
    """PUBLISH number 1 with QoS 1."""
    body = probe_mqtt.field(topic.encode()) + b"\x00\x01" + payload.encode()
    return b"\x32" + probe_mqtt.length(len(body)) + body
