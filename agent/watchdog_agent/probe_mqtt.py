"""MQTT 3.1.1: CONNECT, and whether the broker takes us (OASIS MQTT 3.1.1, 3.1 and 3.2). With `tls` the
handshake comes before it: `probe_mqtt_tls`, which is loaded only then."""

from __future__ import annotations

import os

from . import checks, http
from .light import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .loop import Loop
    from .shapes import Ended, Probe

REFUSED = {
    1: "it does not speak MQTT 3.1.1",
    2: "it refuses the client's name",
    3: "it is not available",
    4: "wrong user or password",
    5: "not authorised",
}
DISCONNECT = b"\xe0\x00"
MOST_PASSWORD = 4096


def check(probe: Probe, where: str) -> None:
    """Raises ConfigError."""
    checks.flag(probe, "tls", False)
    checks.port(probe, where, 8883 if probe["tls"] else 1883)
    checks.text(probe, "user", None)
    checks.text(probe, "password_file", None)
    if probe.get("password_file") and not probe.get("user"):
        raise checks.ConfigError(f"{where}: password_file needs user")
    if probe["tls"]:
        from . import probe_tls

        probe_tls.check_trust(probe, where)


def start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Connect with a clean session; a broker that takes us is told that we leave."""
    try:
        password = secret(spec["password_file"]) if spec.get("password_file") else None
    except OSError as error:
        text = f"password_file: {http.reason_of(error)}"
        loop.later(0, lambda: ended(False, text))
        return

    def answered(status: int | None, _headers: dict[str, str], body: Any) -> None:
        if status is None:
            ended(False, body)
        elif status:
            ended(False, REFUSED.get(status, f"it refuses with code {status}"))
        else:
            ended(True, "connected")

    packet = connect(f"watchdog-{os.urandom(6).hex()}", spec.get("user"), password)
    place = (address, spec["port"])
    if spec["tls"]:
        from . import probe_mqtt_tls

        probe_mqtt_tls.begin(loop, place, packet, spec, answered)
    else:
        Dialogue(loop, place, packet, spec["timeout_s"], answered)


def secret(path: str) -> bytes:
    """What a file holds, but for blanks around it; read anew each time. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(MOST_PASSWORD).strip()


class Dialogue(http.Fetch):
    """Its answer is CONNACK, whose code becomes the status."""

    def _receive(self) -> None:
        assert self.sock is not None
        data = self.sock.recv(64)
        self.got += data
        try:
            code = connack(bytes(self.got), closed=not data)
        except http.HttpError as error:
            self._end(None, str(error))
            return
        if code is not None:
            if code == 0:
                self._connected()
            else:
                self._end(code, {})

    def _connected(self) -> None:
        """The broker has taken us."""
        assert self.sock is not None
        try:
            self.sock.send(DISCONNECT)
        except OSError:
            pass  # it took us all the same
        self._end(0, {})


def connect(client: str, user: str | None, password: bytes | None) -> bytes:
    """A CONNECT packet; clean session, kept alive for 60 s."""
    flags = 0x02 | (0x80 if user is not None else 0) | (0x40 if password is not None else 0)
    body = field(b"MQTT") + struct.pack("!BBH", 4, flags, 60) + field(client.encode())
    if user is not None:
        body += field(user.encode())
    if password is not None:
        body += field(password)
    return b"\x10" + length(len(body)) + body


def field(data: bytes) -> bytes:
    """Bytes with their length before them."""
    return struct.pack("!H", len(data)) + data


def length(number: int) -> bytes:
    """The remaining length of a packet, 7 bits a byte."""
    out = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)


def connack(got: bytes, *, closed: bool) -> int | None:
    """The return code, None while more is to come. Raises HttpError when it is no CONNACK."""
    if not b"\x20\x02".startswith(got[:2]):
        raise http.HttpError("its answer is not MQTT")
    if len(got) >= 4:
        return got[3]
    if closed:
        raise http.HttpError("it closed the connection without an answer")
    return None
