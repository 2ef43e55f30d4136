"""Publishes one message to an MQTT broker, at least once (QoS 1), so that the broker acknowledges it.

CONNECT; after CONNACK a PUBLISH; after PUBACK a DISCONNECT
(docs.oasis-open.org/mqtt/mqtt/v3.1.1). Only these two answers are read. If a broker refuses
MQTT 3.1.1, MQTT 5 is tried (`probes.mqtt.Talk`). With `tls`, the TLS handshake comes first.
"""

from __future__ import annotations

import os

from watchdog_agent.probes import mqtt
from watchdog_agent.runtime import http, secrets
from watchdog_agent.runtime.http_response import HttpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Ended, Fetched, Step

_PUBACK: Final = b"\x40\x02\x00\x01"


def start(loop: Loop, step: Step, _device: dict[str, str], ended: Ended) -> MqttRun:
    """Start it; `ended(ok, reason)` is called once, unless it is cancelled. Raises OSError."""
    return MqttRun(loop, step, ended)


class MqttRun:
    """One message over one connection, or over a second one in MQTT 5."""

    def __init__(self, loop: Loop, step: Step, ended: Ended) -> None:
        self.ended: Ended | None = ended
        self.loop, self.step = loop, step
        # The caller enforces the timeout; this one is always longer.
        self.talk = mqtt.Talk(step, step["timeout_s"] + 1.0, self._begin, self._answered)

    def _begin(self, level: int, wait_s: float, done: Fetched) -> http.HttpRequest:
        step, packet = self.step, connect(self.step, level)
        place = step["broker_at"]
        if step.get("tls"):
            from watchdog_agent.probes import tls  # loads ssl

            fetch: Publish = tls.secured(Publish, self.loop, place, packet, step, wait_s, done)
        else:
            fetch = Publish(self.loop, place, packet, wait_s, done)
        fetch.message = publish(step["topic"], step["payload"], level)
        if level == 5:
            from watchdog_agent.probes import mqtt5

            fetch.puback = mqtt5.puback
        return mqtt.speaking(fetch, level)

    def _answered(self, status: int | None, text: str) -> None:
        if self.ended is None:
            return
        if status == 0:
            self.ended(True, "published")
        else:
            who = "the broker" if status is None else "the broker refuses"
            self.ended(False, f"{who}: {text}")

    def finish_soon(self) -> None:
        """No-op: cannot be sped up."""

    def cancel(self) -> None:
        """Cancel it without a result."""
        self.ended = None
        self.talk.fetch.cancel()


def puback(got: bytes, *, closed: bool) -> int | None:
    """0 = the message is accepted, None if more bytes are needed. Raises HttpError for anything else."""
    if len(got) >= 4:
        if got[:4] == _PUBACK:
            return 0
        raise HttpError("it did not take the message")
    if closed:
        raise HttpError("it closed the connection without an answer")
    return None


class Publish(mqtt.Dialogue):
    """Continues after CONNACK and ends with PUBACK, whose code becomes the status."""

    message = b""
    puback = staticmethod(puback)

    def _connected(self) -> None:
        if not self.message:
            super()._connected()  # the message is accepted
            return
        assert self.sock is not None
        message, self.message, self.got = self.message, b"", b""
        self.connack = self.puback
        # A new connection accepts this little data in one piece.
        if self.sock.send(message) < len(message):
            self._fail("it does not take what we send")


def connect(step: Step, level: int) -> bytes:
    """Encode CONNECT with a clean session, and with user and password if configured. Raises OSError."""
    user, file = step.get("user") or None, step.get("password_file", "")
    password = secrets.read(file) if user and file else None
    return mqtt.connect(f"wd{os.urandom(8).hex()}", user, password, level)


def publish(topic: str, payload: str, level: int) -> bytes:
    """Encode PUBLISH with packet ID 1 and QoS 1; at `level` 5 without properties."""
    body = mqtt.field(topic.encode()) + b"\x00\x01" + b"\x00" * (level == 5)
    body += payload.encode()
    return b"\x32" + mqtt.length(len(body)) + body
