"""SNMP v2c: GET sysUpTime.0 (RFC 3416, RFC 1213), with a minimal BER codec (X.690)."""

from __future__ import annotations

import os

from watchdog_agent.config import optional_table, validators
from watchdog_agent.probes import udp_query
from watchdog_agent.runtime import http, outcome, secrets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Document, Ended, Probe

UP_TIME = bytes((0x2B, 6, 1, 2, 1, 1, 3, 0))
"""1.3.6.1.2.1.1.3.0"""
INTEGER, OCTETS, NULL, OID, SEQUENCE, TICKS, GET, RESPONSE = 2, 4, 5, 6, 0x30, 0x43, 0xA0, 0xA2
_ERRORS = ("", "answer too big", "no such name", "bad value", "read only", "general error")


class SnmpError(Exception):
    """The answer is not valid SNMP; the text describes why."""


def check(probe: Document, where: str) -> None:
    """Check the settings. Raises ConfigError."""
    validators.fill(probe, optional_table.SnmpProbe, where)


def start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Send the query. The community is a secret and is read from a file; without a file it is `public`."""
    try:
        community = (
            secrets.read(spec["community_file"]) if spec.get("community_file") else b"public"
        )
    except OSError as error:
        text = outcome.Unable(f"community_file: {http.reason_of(error)}")
        loop.later(0, lambda: ended(False, text))
        return
    ident = int.from_bytes(os.urandom(4), "big") >> 1

    def judge(data: bytes) -> tuple[bool, str] | None:
        try:
            answer = up_time(data, ident)
        except SnmpError as error:
            return False, f"its answer is not SNMP: {error}"
        if isinstance(answer, str):
            return False, answer
        return None if answer is None else (True, f"up for {answer // 100} s")

    packet = get(community, ident)
    udp_query.UdpQuery(loop, (address, spec["port"]), packet, spec["timeout_s"], judge, ended)


def get(community: bytes, ident: int) -> bytes:
    """Encode the request. The answer repeats `ident` (0 to 2³¹-1)."""
    binding = tlv(SEQUENCE, tlv(OID, UP_TIME) + tlv(NULL, b""))
    pdu = integer(ident) + integer(0) + integer(0) + tlv(SEQUENCE, binding)
    return tlv(SEQUENCE, integer(1) + tlv(OCTETS, community) + tlv(GET, pdu))


def tlv(tag: int, content: bytes) -> bytes:
    """Encode one element."""
    size = len(content)
    if size < 128:
        return bytes((tag, size)) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + content


def integer(value: int) -> bytes:
    """Encode a non-negative INTEGER."""
    return tlv(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def read_element(data: bytes, at: int, tag: int) -> tuple[bytes, int]:
    """(content, offset of the next element) of the element at `at`, which must have this tag.

    Raises SnmpError."""
    if at + 2 > len(data) or data[at] != tag:
        raise SnmpError(f"no element of type {tag:#04x} where one must be")
    size = data[at + 1]
    at += 2
    if size & 0x80:
        octets = size & 0x7F
        if not 0 < octets <= 3 or at + octets > len(data):
            raise SnmpError("a length is wrong")
        size = int.from_bytes(data[at : at + octets], "big")
        at += octets
    if at + size > len(data):
        raise SnmpError("it is cut off")
    return data[at : at + size], at + size


def number(data: bytes, at: int, tag: int = INTEGER) -> tuple[int, int]:
    """(value, offset of the next element) of a number. Raises SnmpError."""
    raw, at = read_element(data, at, tag)
    if not 0 < len(raw) <= 5:
        raise SnmpError("a number is too long")
    return int.from_bytes(raw, "big", signed=tag == INTEGER), at


def up_time(data: bytes, ident: int) -> int | str | None:
    """The uptime in hundredths of a second, or the reason why there is none; None: the answer to another request.

    Raises SnmpError."""
    message, _ = read_element(data, 0, SEQUENCE)
    version, at = number(message, 0)
    _, at = read_element(message, at, OCTETS)
    pdu, _ = read_element(message, at, RESPONSE)
    answered, at = number(pdu, 0)
    if version != 1:
        raise SnmpError(f"version {version}")
    if answered != ident:
        return None
    error, at = number(pdu, at)
    _, at = number(pdu, at)
    if error:
        return _ERRORS[error] if 0 < error < len(_ERRORS) else f"error {error}"
    bindings, _ = read_element(pdu, at, SEQUENCE)
    binding, _ = read_element(bindings, 0, SEQUENCE)
    name, at = read_element(binding, 0, OID)
    if name != UP_TIME:
        raise SnmpError("it answers another question")
    if binding[at : at + 1] in (b"\x80", b"\x81", b"\x82"):
        return "it has no sysUpTime"
    return number(binding, at, TICKS)[0]
