"""HTTPS probes, and the remaining validity of certificates. Loads `ssl`, which adds about two thirds to the
memory of an agent that uses it."""

from __future__ import annotations

import ssl
import time

from watchdog_agent.config import optional_table, validators
from watchdog_agent.config.probes import check_http
from watchdog_agent.config.validators import check_trust
from watchdog_agent.probes import builtin
from watchdog_agent.runtime import tls
from watchdog_agent.runtime.http import bare_host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from watchdog_agent.runtime.http import HttpRequest
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Address, Document, Ended, Fetched, Probe, Step

DAY_S = 86400
MIN_PATIENCE_S = 0.05
UTC_TIME, GENERALIZED_TIME = 0x17, 0x18


class CertificateError(Exception):
    """The certificate cannot be parsed."""


def check(probe: Document, where: str) -> None:
    """Check the settings. Raises ConfigError."""
    if probe["kind"] == "tls":
        validators.fill(probe, optional_table.TlsProbe, where)
    else:
        check_http(probe, where)
    check_trust(probe, where, later=True)


def start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Start a probe of either kind. All of it, even the handshake, runs in the loop."""
    if spec["kind"] == "https":
        builtin.http_probe(loop, spec, address, ended, _Https)
    else:
        place = (address, spec["port"])
        days = spec["warn_days"]

        def shaken(status: int | None, _headers: dict[str, str], body: bytes, reason: str) -> None:
            ended(*((False, reason) if status is None else judge(body, time.time(), days)))

        fetch = _Handshake(loop, place, b"", spec["timeout_s"], shaken, spec["trust"].now())
        fetch.doubtful, fetch.began = bool(spec["client_cert"]), time.monotonic()
        named(fetch, spec)


def judge(der: bytes, now: float, warn_days: float) -> tuple[bool, str, str]:
    """Check a certificate's validity at `now` (seconds since 1970), with a warning if it expires in less than
    warn_days: (ok, reason, warning)."""
    try:
        end = expiry(der)
    except CertificateError as error:
        return False, f"its certificate can't be read: {error}", ""
    left = (end - now) / DAY_S
    date = time.strftime("%Y-%m-%d", time.gmtime(end))
    if left < 0:
        return False, f"its certificate expired on {date}, {-left:.0f} days ago", ""
    reason = f"its certificate expires on {date}, in {left:.0f} days"
    return True, reason, f"{reason} (warn_days is {warn_days:g})" if left < warn_days else ""


def named(fetch: tls.SecureRequest, spec: Probe | Step) -> None:
    """Use the configured server name instead of the address."""
    # Nothing has been sent yet: the event loop has not run since.
    if spec.get("server_name"):
        fetch.name = bare_host(spec["server_name"]).encode("ascii")


_secure: dict[type, type] = {}


def secured(
    kind: type[HttpRequest],
    loop: Loop,
    place: Address,
    packet: bytes,
    spec: Probe | Step,
    timeout_s: float,
    answered: Fetched,
) -> Any:
    """An instance of `kind`, an exchange over TCP, that begins with a TLS handshake as the probe or step configures."""
    if kind not in _secure:
        _secure[kind] = type(f"Secure{kind.__name__}", (kind, tls.SecureRequest), {})
    fetch = _secure[kind](loop, place, packet, timeout_s, answered, spec["trust"].now())
    named(fetch, spec)
    return fetch


class _Handshake(tls.SecureRequest):
    """A request that ends with the peer's certificate instead of a response."""

    began = 0.0
    doubtful = False
    """Whether the peer may still refuse: in TLS 1.3 the client finishes before the server has checked the client
    certificate. A refusal arrives after one more round trip; the handshake took two."""
    certificate = b""

    def _step(self) -> None:
        self._shake()
        assert isinstance(self.sock, ssl.SSLSocket)
        if not self.certificate:
            self.certificate = self.sock.getpeercert(binary_form=True) or b""
            if self.doubtful and self.sock.version() == "TLSv1.3":
                took_s = time.monotonic() - self.began
                self.patience = self.loop.later(MIN_PATIENCE_S + 2 * took_s, self._good)
            else:
                self.doubtful = False
        if self.doubtful:
            # Raises while no data arrives. An alert, or an end without close_notify, is a refusal.
            self.sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]  # typeshed lacks it
            self.sock.recv(1)
        self._good()

    def _good(self) -> None:
        self._end(200, {}, self.certificate)

    def cancel(self) -> None:
        if self.certificate and self.doubtful:
            self.patience[2] = None
        super().cancel()


def _Https(  # noqa: N802  # stands in for the class HttpRequest
    loop: Loop, place: Address, data: bytes, spec: Probe, answered: Fetched, max_body: int
) -> None:
    fetch = tls.SecureRequest(
        loop, place, data, spec["timeout_s"], answered, spec["trust"].now(), max_body
    )
    named(fetch, spec)


def expiry(der: bytes) -> float:
    """The end of a certificate's validity (notAfter), in seconds since 1970 (RFC 5280, 4.1). Raises CertificateError.

    Python returns the fields of a certificate only after verifying it."""
    _, body, _ = element(der, 0)
    _, fields, _ = element(body, 0)
    at = 0
    tag, _, after = element(fields, at)
    if tag == 0xA0:  # the version comes first, unless it is 1
        at = after
    for _ in range(3):  # serial number, algorithm, issuer
        _, _, at = element(fields, at)
    _, validity, _ = element(fields, at)
    _, _, at = element(validity, 0)
    tag, text, _ = element(validity, at)
    return seconds_of(tag, text)


def element(data: bytes, at: int) -> tuple[int, bytes, int]:
    """(tag, content, offset of the next element) of one DER element. Raises CertificateError."""
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
    """Convert a UTCTime or GeneralizedTime to seconds since 1970. Raises CertificateError."""
    digits = text[:-1]
    if tag not in (UTC_TIME, GENERALIZED_TIME) or text[-1:] != b"Z" or not digits.isdigit():
        raise CertificateError("its end is no time")
    if tag == UTC_TIME:
        digits = (b"19" if digits[:2] >= b"50" else b"20") + digits
    if len(digits) != 14:
        raise CertificateError("its end is no time")
    year, month, day = int(digits[:4]), int(digits[4:6]), int(digits[6:8])
    hour, minute, second = int(digits[8:10]), int(digits[10:12]), int(digits[12:14])
    # Days since 1970 in the proleptic Gregorian calendar, with years starting in March.
    shifted = year - (month <= 2)
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    days = shifted * 365 + shifted // 4 - shifted // 100 + shifted // 400 + of_year - 719468
    return days * DAY_S + hour * 3600 + minute * 60 + second
