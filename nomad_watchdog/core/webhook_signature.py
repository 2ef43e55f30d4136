"""Verifies webhooks that are signed by the Standard Webhooks scheme, and detects replays.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
The package of that name reads its own clock, signs a parsed number instead of the received text, and raises
arbitrary errors for hostile headers. This module replaces it, and is tested with its test vector.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Final

PREFIX: Final = "whsec_"
TOLERANCE_S: Final = 300
"""Maximum difference between the sender's clock and ours, in seconds, in both directions."""
MAX_ID: Final = 256
MAX_SIGNATURES: Final = 16
"""Maximum number of signatures in one header: key rotation needs fewer, and each one costs time."""
MAX_KEPT: Final = 65_536
"""Maximum number of ids in a window; the oldest is dropped, and then only `core.event_order` detects its replay."""
_SECONDS: Final = re.compile(r"[1-9][0-9]{0,11}", re.ASCII)


class SignatureError(Exception):
    """The call is not signed correctly. The message says what is wrong, and contains no secrets."""


@dataclass(frozen=True, slots=True)
class SignatureHeaders:
    """Id and signing time of a call. The sender chooses the id: it is the same for each delivery attempt of an
    event."""

    id: str
    at: int
    """Unix seconds, of the sender's clock."""


def secret_of(text: str) -> bytes:
    """The bytes of ``whsec_<base64>``. Raises ValueError unless it contains 24 to 64 bytes."""
    if not text.startswith(PREFIX):
        raise ValueError(f"a secret begins with {PREFIX}")
    try:
        secret = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except ValueError:
        raise ValueError(f"what follows {PREFIX} is not base64") from None
    if not 24 <= len(secret) <= 64:
        raise ValueError(f"a secret has 24 to 64 bytes, this one has {len(secret)}")
    return secret


def sign(secret: bytes, signed: SignatureHeaders, body: bytes) -> str:
    """One signature, as in the header."""
    return "v1," + base64.b64encode(_mac(secret, signed, body)).decode()


def _mac(secret: bytes, signed: SignatureHeaders, body: bytes) -> bytes:
    mac = _keyed(secret).copy()
    mac.update(b"%b.%d.%b" % (signed.id.encode(), signed.at, body))
    return mac.digest()


@lru_cache(maxsize=64)
def _keyed(secret: bytes) -> hmac.HMAC:
    """A keyed HMAC, to be copied. `hmac.digest` sets up the key each time and releases the interpreter lock: while
    another thread writes, the event loop waits about 0.1 ms to get it back."""
    return hmac.new(secret, digestmod="sha256")


def check_form(headers: tuple[str, str, str], now: float) -> None:
    """Check the headers of a call before its body is read: their form and time. now: unix seconds.

    Raises SignatureError."""
    signed, given = _form(headers)
    if not any(len(one) == hashlib.sha256().digest_size for one in given):
        raise SignatureError("webhook-signature must hold v1, and the base64 of 32 bytes")
    _check_time(signed, now)


def verify(
    secrets: Sequence[bytes], headers: tuple[str, str, str], body: bytes, now: float
) -> SignatureHeaders:
    """Verify ``(webhook-id, webhook-timestamp, webhook-signature)`` for this body. now: unix seconds.

    Raises SignatureError. The signature is checked before the time, and with every secret, so that the answer does
    not reveal which part was right.
    """
    signed, given = _form(headers)
    good = False
    for secret in secrets:
        wanted = _mac(secret, signed, body)
        for one in given:
            good |= hmac.compare_digest(wanted, one)
    if not good:
        raise SignatureError("no signature of webhook-signature fits the body and our secrets")
    _check_time(signed, now)
    return signed


def _form(headers: tuple[str, str, str]) -> tuple[SignatureHeaders, list[bytes]]:
    message_id, timestamp, signatures = headers
    if not message_id or not timestamp or not signatures:
        raise SignatureError(
            "the headers webhook-id, webhook-timestamp, webhook-signature are needed"
        )
    if len(message_id) > MAX_ID or not message_id.isascii() or not message_id.isprintable():
        raise SignatureError(f"webhook-id must be at most {MAX_ID} printable ASCII characters")
    if not _SECONDS.fullmatch(timestamp):
        raise SignatureError("webhook-timestamp must be whole seconds since 1970")
    given = [_bytes_of(one) for one in signatures.split(" ", MAX_SIGNATURES)[:MAX_SIGNATURES]]
    return SignatureHeaders(message_id, int(timestamp)), given


def _check_time(signed: SignatureHeaders, now: float) -> None:
    if abs(now - signed.at) > TOLERANCE_S:
        raise SignatureError(
            f"webhook-timestamp is {abs(now - signed.at):.0f} s from our clock; "
            f"at most {TOLERANCE_S} are allowed"
        )


def _bytes_of(signature: str) -> bytes:
    version, _, text = signature.partition(",")
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
    # Unused bits of the last character may have any value: only the text that `sign` writes counts.
    is_canonical = base64.b64encode(decoded).decode() == text
    return decoded if version == "v1" and is_canonical else b""


class Seen(StrEnum):
    """State of an id in a window."""

    NEW = "new"
    DONE = "done"
    """The same event was applied."""
    BUSY = "busy"
    """The same event is being applied."""
    OTHER = "other"
    """The id was used for another body."""


@dataclass(slots=True)
class ReplayWindow:
    """The ids of the last minutes. A call claims its id, and settles it when the event is durable."""

    most: int = MAX_KEPT
    _kept: OrderedDict[bytes, _Entry] = field(default_factory=OrderedDict)

    def claim(self, signed: SignatureHeaders, body: bytes, now: float) -> Seen:
        """Claim an id and return its previous state; a NEW one is BUSY until `settle`."""
        self._forget(now)
        key, digest = _digest(signed.id.encode()), _digest(body)
        entry = self._kept.get(key)
        if entry is None:
            # After this time the timestamp is too old, so that a replay is refused in any case.
            self._kept[key] = _Entry(digest, until=signed.at + TOLERANCE_S)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
            return Seen.NEW
        if entry.body != digest:
            return Seen.OTHER
        return Seen.DONE if entry.done else Seen.BUSY

    def settle(self, signed: SignatureHeaders, *, done: bool) -> None:
        """Settle a claim. `done`: the event was applied; otherwise it may be sent again."""
        key = _digest(signed.id.encode())
        entry = self._kept.get(key)
        if entry is None:
            return
        if done:
            entry.done = True
        else:
            del self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    def _forget(self, now: float) -> None:
        # In the order of arrival: an entry with a future timestamp keeps those behind it a little longer.
        while self._kept and next(iter(self._kept.values())).until < now:
            self._kept.popitem(last=False)


@dataclass(slots=True)
class _Entry:
    body: bytes
    until: float
    done: bool = False


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]
