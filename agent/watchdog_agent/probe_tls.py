"""HTTPS, and how long a certificate is still good. Loads `ssl`, which costs an agent that uses it about
half as much memory again."""

from __future__ import annotations

import ssl
import time

from . import checks, probes, tls
from .config_probes import check_http

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .loop import Loop
    from .shapes import Ended, Probe

DAY_S = 86400
UTC_TIME, GENERALIZED_TIME = 0x17, 0x18


class CertificateError(Exception):
    """It is no certificate that we can read."""


def check(probe: Probe, where: str) -> None:
    """Raises ConfigError."""
    checks.port(probe, where, 443)
    checks.flag(probe, "verify", True)
    if not isinstance(probe.setdefault("ca_cert", ""), str):
        raise checks.ConfigError(f"{where}: ca_cert must be PEM text or the path of a file")
    if probe.get("server_name") is not None:
        checks.address(probe["server_name"], f"{where}: server_name")
    if probe["kind"] == "tls":
        checks.number(probe, "min_days", 14, 0, 3650)
    else:
        check_http(probe, where)
    probe["context"] = context_of(probe)


def context_of(spec: Probe) -> ssl.SSLContext:
    """What is trusted; with `verify = false` everybody. Raises ConfigError."""
    if spec["verify"]:
        return tls.trusting(spec["ca_cert"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Either kind; all is steps of the loop, the handshake too."""
    if spec["kind"] == "https":
        probes.http_probe(loop, spec, address, ended, _Https)
    else:
        place = (address, spec["port"])
        days = spec["min_days"]

        def shaken(status: int | None, _headers: dict[str, str], body: Any) -> None:
            ended(*((False, body) if status is None else judge(body, time.time(), days)))

        _named(_Handshake(loop, place, b"", spec["timeout_s"], shaken, spec["context"]), spec)


def judge(der: bytes, now: float, min_days: float) -> tuple[bool, str]:
    """Whether a certificate is good for min_days from `now` (seconds since 1970)."""
    try:
        left = (expiry(der) - now) / DAY_S
    except CertificateError as error:
        return False, f"its certificate can't be read: {error}"
    if left < 0:
        return False, f"its certificate expired {-left:.0f} days ago"
    if left < min_days:
        return False, f"its certificate expires in {left:.0f} days; {min_days:g} are wanted"
    return True, f"certificate good for {left:.0f} days"


def _named(fetch: tls.SecureFetch, spec: Probe) -> None:
    # Nothing has been sent yet: the loop has not run since.
    if spec.get("server_name"):
        fetch.name = spec["server_name"].encode("ascii")


class _Handshake(tls.SecureFetch):
    """Ends with the certificate of the other side instead of an answer."""

    def _step(self) -> None:
        self._shake()
        assert isinstance(self.sock, ssl.SSLSocket)
        self._end(200, {}, self.sock.getpeercert(binary_form=True) or b"")


def _Https(  # noqa: N802  # stands in for the class Fetch
    loop: Loop, place: Any, data: bytes, spec: Probe, answered: Any, max_body: int
) -> None:
    fetch = tls.SecureFetch(
        loop, place, data, spec["timeout_s"], answered, spec["context"], max_body
    )
    _named(fetch, spec)


def expiry(der: bytes) -> float:
    """When a certificate ends (notAfter), seconds since 1970 (RFC 5280, 4.1). Raises CertificateError.

    Python gives the fields of a certificate only when it has verified it."""
    _, body, _ = element(der, 0)
    _, fields, _ = element(body, 0)
    at = 0
    tag, _, after = element(fields, at)
    if tag == 0xA0:  # the version stands first, if it is not 1
        at = after
    for _ in range(3):  # serial number, algorithm, issuer
        _, _, at = element(fields, at)
    _, validity, _ = element(fields, at)
    _, _, at = element(validity, 0)
    tag, text, _ = element(validity, at)
    return seconds_of(tag, text)


def element(data: bytes, at: int) -> tuple[int, bytes, int]:
    """(tag, content, where the next begins) of one DER element. Raises CertificateError."""
    if at + 2 > len(data):
        raise CertificateError("it is cut off")
    tag, length = data[at], data[at + 1]
    at += 2
    if length & 0x80:
        size = length & 0x7F
        if not 0 < size <= 4 or at + size > len(data):
            raise CertificateError("a length is wrong")
        length = int.from_bytes(data[at : at + size], "big")
        at += size
    if at + length > len(data):
        raise CertificateError("it is cut off")
    return tag, data[at : at + length], at + length


def seconds_of(tag: int, text: bytes) -> float:
    """UTCTime or GeneralizedTime in seconds since 1970. Raises CertificateError."""
    digits = text[:-1]
    if tag not in (UTC_TIME, GENERALIZED_TIME) or text[-1:] != b"Z" or not digits.isdigit():
        raise CertificateError("its end is no time")
    if tag == UTC_TIME:
        digits = (b"19" if digits[:2] >= b"50" else b"20") + digits
    if len(digits) != 14:
        raise CertificateError("its end is no time")
    year, month, day = int(digits[:4]), int(digits[4:6]), int(digits[6:8])
    hour, minute, second = int(digits[8:10]), int(digits[10:12]), int(digits[12:14])
    # Days since 1970 of the proleptic Gregorian calendar, with the year beginning in March.
    shifted = year - (month <= 2)
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    days = shifted * 365 + shifted // 4 - shifted // 100 + shifted // 400 + of_year - 719468
    return days * DAY_S + hour * 3600 + minute * 60 + second
