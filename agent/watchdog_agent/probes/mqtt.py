"""MQTT: sends CONNECT and checks whether the broker accepts it (OASIS MQTT 3.1.1, 3.1 and 3.2).

If a broker refuses MQTT 3.1.1, the probe tries MQTT 5 once, whose answers `mqtt5` reads. With `tls`, the
TLS handshake comes first. The modules for either are loaded only when needed.
"""

from __future__ import annotations

import os
import time

from watchdog_agent import errors
from watchdog_agent.config import optional_table, validators
from watchdog_agent.runtime import http, outcome, secrets
from watchdog_agent.runtime.http_response import HttpError
from watchdog_agent.runtime.stdlib_light import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Document, Ended, Fetched, Probe, Step

VERSION = 1
"""CONNACK code: the broker does not support MQTT 3.1.1."""
MQTT5_ONLY = 0x84
"""The same as a reason code of MQTT 5."""
HUNG_UP = -2
"""The broker closed the connection without an answer, as an MQTT 5 broker may do on MQTT 3.1.1
(MQTT 5.0, 3.1.2.2)."""
REFUSED = {
    VERSION: "it does not speak MQTT 3.1.1",
    MQTT5_ONLY: "the broker speaks MQTT 5 only",
    HUNG_UP: "it closed the connection without an answer",
    2: "it refuses the client's name",
    3: "it is not available",
    4: "wrong user or password",
    5: "not authorised",
}
_OTHER_VERSION = (VERSION, MQTT5_ONLY, HUNG_UP)
"""Codes after which MQTT 5 is tried."""
DISCONNECT = b"\xe0\x00"


def check(probe: Document, where: str) -> None:
    """Check the settings. Raises ConfigError."""
    validators.fill(probe, optional_table.Mqtt, where)
    if probe.get("password_file") and not probe.get("user"):
        raise errors.ConfigError(f"{where}: password_file needs user")
    if probe["tls"]:
        validators.check_trust(probe, where)


def start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Connect with a clean session; after an accepted connection, send DISCONNECT."""
    try:
        password = secrets.read(spec["password_file"]) if spec.get("password_file") else None
    except OSError as error:
        text = outcome.Unable(f"password_file: {http.reason_of(error)}")
        loop.later(0, lambda: ended(False, text))
        return

    def answered(status: int | None, text: str) -> None:
        ended(status == 0, text)

    def begin(level: int, wait_s: float, done: Fetched) -> http.HttpRequest:
        packet = connect(f"watchdog-{os.urandom(6).hex()}", spec.get("user"), password, level)
        place = (address, spec["port"])
        if spec["tls"]:
            from watchdog_agent.probes import tls  # loads ssl

            dialogue: Dialogue = tls.secured(Dialogue, loop, place, packet, spec, wait_s, done)
        else:
            dialogue = Dialogue(loop, place, packet, wait_s, done)
        return speaking(dialogue, level)

    Talk(spec, spec["timeout_s"], begin, answered)


class Talk:
    """One exchange with a broker: in MQTT 3.1.1, or in MQTT 5 if the broker requires it. `spec["level"]` stores
    the level for the next run, until the broker no longer answers in MQTT 5."""

    def __init__(
        self,
        spec: Probe | Step,
        timeout_s: float,
        begin: Callable[[int, float, Fetched], http.HttpRequest],
        answered: Callable[[int | None, str], None],
    ) -> None:
        """`begin(level, timeout_s, done)` connects at this protocol level, 4 or 5. `answered(code, reason)`:
        0 = accepted, None = no answer, otherwise refused. Raises what `begin` raises."""
        self.spec, self.begin, self.answered = spec, begin, answered
        self.until = time.monotonic() + timeout_s
        self.why = ""
        """The reason for trying MQTT 5 after MQTT 3.1.1."""
        self.level = spec.get("level", 4)
        self.fetch = begin(self.level, timeout_s, self._ended)

    def _ended(
        self, status: int | None, _headers: dict[str, str], _body: bytes, reason: str
    ) -> None:
        if self.level == 4 and status in _OTHER_VERSION:
            self.level, self.why = 5, refusal(status, 4)
            left_s = round(max(0.01, self.until - time.monotonic()), 2)
            try:
                self.fetch = self.begin(5, left_s, self._ended)
            except (OSError, errors.ConfigError) as error:
                self.answered(None, outcome.Unable(http.reason_of(error)))
            return
        if status == 0:
            reason = "connected" if self.level == 4 else "connected with MQTT 5"
        elif status is not None:
            reason = refusal(status, self.level)
        if self.level == 5 and status not in (None, MQTT5_ONLY):
            self.spec["level"] = 5
        else:
            self.spec.pop("level", None)
            if self.why and self.why != reason:
                reason = type(reason)(f"{self.why}; in MQTT 5: {reason}")
        self.answered(status, reason)


def refusal(code: int, level: int) -> str:
    """Description of a CONNACK code, or in MQTT 5 of a PUBACK code."""
    words = REFUSED.get(code) if level == 4 else None
    if words is None and code >= 0x80:
        from watchdog_agent.probes import mqtt5

        words = mqtt5.REASONS.get(code)
    return words or f"code {code}"


def speaking(dialogue: Dialogue, level: int) -> Dialogue:
    """The same dialogue, set to parse answers of this protocol level."""
    if level == 5:
        from watchdog_agent.probes import mqtt5

        # Nothing has been sent yet: the event loop has not run since.
        dialogue.connack = mqtt5.connack
    return dialogue


def connack(got: bytes, *, closed: bool) -> int | None:
    """The return code, or None if more bytes are needed; MQTT5_ONLY for an MQTT 5 CONNACK, HUNG_UP for none.
    Raises HttpError for anything else."""
    if got[:1] not in (b"", b"\x20") or got[1:2] in (b"\x00", b"\x01"):
        raise HttpError("its answer is not MQTT")
    if len(got) >= 2 and got[1] > 2:
        return MQTT5_ONLY
    if len(got) >= 4:
        return got[3]
    if closed:
        if not got:
            return HUNG_UP
        raise HttpError("it closed the connection in the middle of its answer")
    return None


class Dialogue(http.HttpRequest):
    """An exchange that ends with CONNACK, whose code becomes the status."""

    got = b""
    connack = staticmethod(connack)

    def _receive(self) -> None:
        assert self.sock is not None
        data = self.sock.recv(64)
        self.got += data
        try:
            code = self.connack(self.got, closed=not data)
        except HttpError as error:
            self._fail(str(error))
            return
        if code is not None:
            if code == 0:
                self._connected()
            else:
                self._end(code, {})

    def _connected(self) -> None:
        """The broker has accepted the connection."""
        assert self.sock is not None
        try:
            self.sock.send(DISCONNECT)
        except OSError:
            pass  # it accepted the connection anyway
        self._end(0, {})


def connect(client: str, user: str | None, password: bytes | None, level: int = 4) -> bytes:
    """Encode a CONNECT packet: clean session, keep-alive 60 s; at `level` 5 without properties."""
    flags = 0x02 | (0x80 if user is not None else 0) | (0x40 if password is not None else 0)
    body = field(b"MQTT") + struct.pack("!BBH", level, flags, 60) + b"\x00" * (level == 5)
    body += field(client.encode())
    if user is not None:
        body += field(user.encode())
    if password is not None:
        body += field(password)
    return b"\x10" + length(len(body)) + body


def field(data: bytes) -> bytes:
    """Encode bytes with a length prefix."""
    return struct.pack("!H", len(data)) + data


def length(number: int) -> bytes:
    """Encode the remaining length of a packet, 7 bits per byte."""
    out = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)
