"""A DNS query over UDP (RFC 1035) to a given server, and a parser that does not trust the response."""

from __future__ import annotations

import os

from watchdog_agent import errors
from watchdog_agent.config import optional_table, validators
from watchdog_agent.probes import udp_query
from watchdog_agent.runtime.stdlib_light import socket, struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Document, Ended, Probe

TYPES = {"A": 1, "AAAA": 28}
MAX_RECORDS = 64
"""Maximum number of records read from a response."""
_FAMILY = {1: socket.AF_INET, 28: socket.AF_INET6}
_RCODES = ("", "bad query", "server failure", "no such name", "not implemented", "refused")


class DnsError(Exception):
    """The response violates RFC 1035; the text describes how."""


def check(probe: Document, where: str) -> None:
    """Check the settings. Raises ConfigError."""
    validators.fill(probe, optional_table.DnsProbe, where)
    validators.require(probe, "name", optional_table.DnsProbe.name, where)
    kind = str(probe["type"])
    if probe.get("server") is not None:
        probe["server"] = validators.host(probe["server"], f"{where}: server")
    try:
        encode_name(str(probe["name"]))
    except DnsError as error:
        raise errors.ConfigError(f"{where}: name is {probe['name']!r}: {error}") from None
    if probe.get("expect_address") is not None:
        try:
            socket.inet_pton(_FAMILY[TYPES[kind]], str(probe["expect_address"]))
        except (OSError, TypeError):
            raise errors.ConfigError(
                f"{where}: expect_address must be an address for {kind} records"
            ) from None


def start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Query `server`, or else the device itself."""
    kind = TYPES[spec["type"]]
    query = encode_query(spec["name"], kind, os.urandom(2))
    wanted = spec.get("expect_address")
    raw = socket.inet_pton(_FAMILY[kind], wanted) if wanted else None

    def judge(data: bytes) -> tuple[bool, str] | None:
        # Inexpensive checks first: it may be a late response to an earlier query, or a forged one.
        if len(data) < 12 or data[:2] != query[:2] or not data[2] & 0x80:
            return None
        try:
            found = addresses(data, query)
        except DnsError as error:
            return False, f"its answer is not DNS: {error}"
        if isinstance(found, str):
            return False, f"{spec['name']}: {found}"
        shown = ", ".join(socket.inet_ntop(_FAMILY[kind], one) for one in found[:4])
        if not found:
            return False, f"{spec['name']} has no {spec['type']} record"
        if raw is not None and raw not in found:
            return False, f"{spec['name']} is {shown}, not {wanted}"
        return True, f"{spec['name']} is {shown}"

    place = (spec.get("server") or address, spec["port"])
    udp_query.UdpQuery(loop, place, query, spec["timeout_s"], judge, ended)


def encode_name(name: str) -> bytes:
    """Encode a name as labels with length bytes. Raises DnsError if that is not possible."""
    labels = [label.encode("ascii", "replace") for label in name.rstrip(".").split(".")]
    if any(not 0 < len(label) < 64 for label in labels):
        raise DnsError("each label must have 1 to 63 characters")
    out = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    if len(out) > 255:
        raise DnsError("a name has at most 253 characters")
    return out


def encode_query(name: str, kind: int, ident: bytes) -> bytes:
    """Encode one question, class IN, recursion desired."""
    head = ident + struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0)
    return head + encode_name(name) + struct.pack("!HH", kind, 1)


def addresses(data: bytes, query: bytes) -> list[bytes] | str:
    """The addresses in the response to this query, or the reason why it has none. Raises DnsError."""
    flags, questions, answers = struct.unpack_from("!HHH", data, 2)
    if code := flags & 15:
        return _RCODES[code] if code < len(_RCODES) else f"error {code}"
    asked = query[12:]
    # Servers may change only the case of letters (0x20).
    if questions != 1 or data[12 : 12 + len(asked)].lower() != asked.lower():
        raise DnsError("it answers another question")
    kind = struct.unpack("!H", asked[-4:-2])[0]
    found = list(_records(data, 12 + len(asked), min(answers, MAX_RECORDS), kind))
    if not found and flags & 0x0200:
        return "the answer is too long for UDP"
    return found


def _records(data: bytes, at: int, count: int, kind: int) -> Iterator[bytes]:
    """The addresses of this type (1 = A, 28 = AAAA) in `count` records starting at `at`. Raises DnsError."""
    size = 4 if kind == 1 else 16
    for _ in range(count):
        at = skip_name(data, at)
        if at + 10 > len(data):
            raise DnsError("a record is cut off")
        rtype, rclass, _, length = struct.unpack_from("!HHIH", data, at)
        at += 10
        if at + length > len(data):
            raise DnsError("a record is cut off")
        if rtype == kind and rclass == 1:
            if length != size:
                raise DnsError(f"an address of {length} bytes")
            yield data[at : at + length]
        at += length


def skip_name(data: bytes, at: int) -> int:
    """The offset after the name at `at`. A pointer ends the name and is not followed: no other name is needed, and
    a pointer loop cannot block the agent. Raises DnsError."""
    begin = at
    while at < len(data):
        length = data[at]
        if length >= 0xC0:
            if at + 2 > len(data) or ((length & 0x3F) << 8 | data[at + 1]) >= begin:
                raise DnsError("a name points forward")
            return at + 2
        if length > 63:
            raise DnsError("a label of unknown kind")
        at += 1 + length
        if not length:
            return at
        if at - begin > 255:
            raise DnsError("a name of more than 255 bytes")
    raise DnsError("a name is cut off")
