"""Validates the address of a device: a host name, an IPv4 or an IPv6 address.

The control plane applies this to every address it receives, the agent to its document. Standard library only;
the control plane converts international names (`nomad_watchdog.device_address`).
"""

from __future__ import annotations

from watchdog_agent.runtime.parsing import whole
from watchdog_agent.runtime.stdlib_light import socket

NAME_CHARS = 253
LABEL_CHARS = 63
ZONE_CHARS = 15
"""Maximum length of a network interface name on Linux."""
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
_ZONE = _LETTERS | {"."}
_EXAMPLES = "write a host name or an IP address, as pump-7.example, 10.0.0.7 or fd00::7"


class AddressError(ValueError):
    """An invalid address. The text describes the error and the expected form."""


def checked(text: object) -> str:
    """The address as it is stored and probed: without brackets, IPv6 in its short form.

    Raises AddressError."""
    text = _printable(text)
    bare = text[1:-1] if text[0] == "[" and text[-1] == "]" else text
    core, percent, zone = bare.partition("%")
    raw = packed(core)
    if raw is None or (len(raw) == 4 and bare is not text):
        return _name(text)
    if percent:
        _check_zone(core, raw, zone)
    elif len(raw) == 16 and _is_link_local(raw):
        raise AddressError(
            f"{core} is a link-local address; write the network interface of the agent's host "
            f"with it, as {core}%eth0"
        )
    if raw[:12] == b"\0" * 10 + b"\xff\xff":
        raw = raw[12:]  # an IPv4-mapped IPv6 address
    if not any(raw):
        raise AddressError(f"{core} is the address of no device; {_EXAMPLES}")
    found = socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
    return f"{found}%{zone}" if zone else found


def _printable(text: object) -> str:
    if not isinstance(text, str) or not text:
        raise AddressError(f"there is no address; {_EXAMPLES}")
    if any(not "!" <= c <= "~" for c in text):
        hint = "" if text.isascii() else "; write the name as xn--…"
        raise AddressError(f"{text[:80]!a} is not printable ASCII without blanks{hint}")
    return text


def endpoint(text: object) -> tuple[str, int]:
    """Parse HOST:PORT, with IPv6 in brackets, into (host, port). The host may also be an address for listening only,
    such as 0.0.0.0. Raises AddressError."""
    wrong = AddressError(f"{str(text)[:80]!a} is not HOST:PORT, as 10.0.0.7:9000 or [fd00::7]:9000")
    host, _, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    bare = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    if (":" in bare) is (bare is host):
        raise wrong
    core, _, zone = bare.partition("%")
    try:
        if packed(core) is None or not _ZONE.issuperset(zone):
            checked(bare)
        return bare, whole(port, 0, 65535)
    except ValueError:
        raise wrong from None


def literal(text: object) -> str:
    """The IP address in this text; "" for a host name or an invalid address."""
    try:
        found = checked(text)
    except AddressError:
        return ""
    return found if packed(found.partition("%")[0]) else ""


def packed(text: str) -> bytes | None:
    """The 4 or 16 bytes of an IP address without a zone; None for other text."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):  # ValueError: a lone surrogate
        return None


def _is_link_local(raw: bytes) -> bool:
    return raw[0] == 0xFE and raw[1] & 0xC0 == 0x80


def _check_zone(core: str, raw: bytes, zone: str) -> None:
    if len(raw) != 16 or not _is_link_local(raw):
        raise AddressError(f"only a link-local address (fe80::…) has a zone; write {core}")
    if not 0 < len(zone) <= ZONE_CHARS or not _ZONE.issuperset(zone):
        raise AddressError(
            f"the zone {zone[:40]!a} is not the name of a network interface; write {core}%eth0"
        )


def _name(text: str) -> str:
    """Check a host name and return it unchanged. Raises AddressError."""
    shown = ascii(text[:80])
    _refuse_more(text, shown)
    name = text.removesuffix(".")
    labels = name.split(".")
    last = labels[-1].lower()
    if last.isdigit() or (last[:2] == "0x" and not last[2:].strip("0123456789abcdef")):
        raise AddressError(
            f"{shown} is not an IPv4 address; write four numbers from 0 to 255, without leading zeros"
        )
    if len(name) > NAME_CHARS or any(not 0 < len(one) <= LABEL_CHARS for one in labels):
        raise AddressError(
            f"{shown} is not a host name; each part between dots must have 1 to {LABEL_CHARS} "
            f"characters, and the name at most {NAME_CHARS}"
        )
    for one in labels:
        if not _LETTERS.issuperset(one) or one[0] == "-" or one[-1] == "-":
            raise AddressError(
                f"{shown} is not a host name; use letters, digits, - and _, and no - at the "
                "beginning or end of a part"
            )
    return text


def _refuse_more(text: str, shown: str) -> None:
    """Raises AddressError for a URL, a path, a network or a port."""
    if "://" in text:
        raise AddressError(f"{shown} is a URL; {_suggested(text.partition('://')[2])}")
    host, slash, rest = text.partition("/")
    if slash:
        what = "has a path" if not rest or not rest[0].isdigit() else "is a network"
        hint = "write the address of one device" if what == "is a network" else _suggested(host)
        raise AddressError(f"{shown} {what}; {hint}")
    if ":" in text:
        host, _, port = text.rpartition(":")
        if port.isdigit() and (":" not in host or (host[0] == "[" and host[-1] == "]")):
            hint = f"{_suggested(host)} (a port belongs to the probe)"
            raise AddressError(f"{shown} has a port; {hint}")
        raise AddressError(f"{shown} is not an IPv6 address; {_EXAMPLES}")


def _suggested(text: str) -> str:
    """A suggestion in place of text that contains an address and more."""
    place = text.partition("/")[0].partition("?")[0].partition("#")[0].rpartition("@")[2]
    for candidate in (place, place.rpartition(":")[0]):
        try:
            return f"write {checked(candidate)}"
        except AddressError:
            continue
    return _EXAMPLES
