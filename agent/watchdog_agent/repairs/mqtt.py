"""Publish one message to an MQTT broker, at least once (QoS 1), so that its taking is known.

CONNECT, and after CONNACK a PUBLISH, and after PUBACK a DISCONNECT
(docs.oasis-open.org/mqtt/mqtt/v3.1.1). Nothing is read beyond those two answers. A broker that refuses
MQTT 3.1.1 is asked in MQTT 5 (`probe_mqtt.Talk`). With `tls` the handshake comes before it.
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
    """Begin; `ended(ok, reason)` is called once, unless it is cancelled. Raises OSError."""
    return MqttRun(loop, step, ended)


class MqttRun:
    """One message over one connection, or over a second one in MQTT 5."""

    def __init__(self, loop: Loop, step: Step, ended: Ended) -> None:
        self.ended: Ended | None = ended
        self.loop, self.step = loop, step
        # The time-out is the caller's; this one is only never shorter.
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
        """Nothing can make it faster."""

    def cancel(self) -> None:
        """Cancel it without a result."""
        self.ended = None
        self.talk.fetch.cancel()


def puback(got: bytes, *, closed: bool) -> int | None:
    """0 = the message is taken, None while more is to come. Raises HttpError for anything else."""
    if len(got) >= 4:
        if got[:4] == _PUBACK:
            return 0
        raise HttpError("it did not take the message")
    if closed:
        raise HttpError("it closed the connection without an answer")
    return None


class Publish(mqtt.Dialogue):
    """Goes on after CONNACK: its answer is PUBACK, whose code becomes the status."""

    message = b""
    puback = staticmethod(puback)

    def _connected(self) -> None:
        if not self.message:
            super()._connected()  # the message is taken
            return
        assert self.sock is not None
        message, self.message, self.got = self.message, b"", b""
        self.connack = self.puback
        # A fresh connection takes so little in one piece.
        if self.sock.send(message) < len(message):
            self._fail("it does not take what we send")


def connect(step: Step, level: int) -> bytes:
    """CONNECT with a clean session, and a user and password where there are any. Raises OSError."""
    user, file = step.get("user") or None, step.get("password_file", "")
    password = secrets.read(file) if user and file else None
    return mqtt.connect(f"wd{os.urandom(8).hex()}", user, password, level)


def publish(topic: str, payload: str, level: int) -> bytes:
    """PUBLISH number 1 with QoS 1; at `level` 5 without properties."""
    body = mqtt.field(topic.encode()) + b"\x00\x01" + b"\x00" * (level == 5)
    body += payload.encode()
    return b"\x32" + mqtt.length(len(body)) + body
