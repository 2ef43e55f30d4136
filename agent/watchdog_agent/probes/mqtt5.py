"""MQTT 5 answers to CONNECT and PUBLISH (OASIS MQTT 5.0, 3.2 and 3.4). Loaded only if a broker has
refused MQTT 3.1.1, or has answered in MQTT 5."""

from __future__ import annotations

from watchdog_agent.runtime.http_response import HttpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

MAX_BYTES: Final = 8192
"""Maximum packet size in bytes; a CONNACK may have many properties."""
_CONNACK, _PUBACK, _DISCONNECT = 0x20, 0x40, 0xE0
_FAILED: Final = 0x80
"""The lowest reason code that means failure."""
REASONS: Final = {
    0x81: "it finds our packet malformed",
    0x82: "it finds a protocol error",
    0x84: "it does not speak MQTT 5",
    0x85: "it refuses the client's name",
    0x86: "wrong user or password",
    0x87: "not authorised",
    0x88: "it is not available",
    0x89: "it is busy",
    0x8A: "it has banned this client",
    0x8B: "it is shutting down",
    0x8C: "it wants another method of authentication",
    0x90: "it does not accept the topic",
    0x95: "the packet is too large for it",
    0x97: "a quota is exceeded",
    0x99: "it does not accept the payload",
    0x9B: "it does not accept QoS 1",
    0x9C: "it asks to use another server",
    0x9D: "it has moved to another server",
    0x9F: "too many connections per second",
}
"""Reason code of a refusal → description (2.4)."""


def connack(got: bytes, *, closed: bool) -> int | None:
    """The reason code, 0 = accepted; None if more bytes are needed. An MQTT 3.1.1 CONNACK counts as "does not
    support MQTT 5". Raises HttpError for anything else."""
    kind, body = packet(got, closed=closed)
    if kind is None:
        return None
    if kind == _CONNACK and len(body) == 2:
        return 0x84
    if kind != _CONNACK or len(body) < 3:
        raise HttpError("its answer is not MQTT")
    return body[1]


def puback(got: bytes, *, closed: bool) -> int | None:
    """The reason code for message 1, 0 = accepted, or that of a DISCONNECT. None if more bytes are needed.
    Raises HttpError for anything else."""
    kind, body = packet(got, closed=closed)
    if kind is None:
        return None
    if kind == _DISCONNECT:
        return body[0] if body else _FAILED
    if kind != _PUBACK or body[:2] != b"\x00\x01":
        raise HttpError("it did not take the message")
    # No code means success; 0x10 means success without a subscriber.
    code = body[2] if len(body) > 2 else 0
    return code if code >= _FAILED else 0


def packet(got: bytes, *, closed: bool) -> tuple[int | None, bytes]:
    """Type and content of the first packet; the type is None if more bytes are needed. Raises HttpError if it
    is invalid or cut off."""
    size = at = 0
    for at in range(1, min(len(got), 5)):
        size |= (got[at] & 0x7F) << 7 * (at - 1)
        if got[at] < 0x80:
            break
    else:
        if len(got) >= 5:
            raise HttpError("its answer is not MQTT")
        size = MAX_BYTES
    if got and got[0] not in (_CONNACK, _PUBACK, _DISCONNECT):
        raise HttpError("its answer is not MQTT")
    if at and size > MAX_BYTES:
        raise HttpError(f"its answer is longer than {MAX_BYTES} bytes")
    whole = got[at + 1 : at + 1 + size]
    if at and len(whole) == size:
        return got[0], whole
    if closed:
        raise HttpError("it closed the connection without an answer")
    return None, b""
