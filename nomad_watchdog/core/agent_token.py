"""An agent's credential: good for the reports of one device at one epoch, and for nothing else.

``wda1.<slug>.<epoch>.<mac>``, where mac is HMAC-SHA256(key, "v1|slug|epoch") as base64url without
padding. The slug and the epoch are said in clear so that a forged one is refused before a body is read,
and one that speaks for another device is told from one that nobody gave. Nothing is stored: whoever has
the key can check it, on every replica.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from watchdog_agent.runtime.parsing import whole

from nomad_watchdog.ids import Slug, is_slug
from nomad_watchdog.model import Epoch

PREFIX: Final = "wda1"
MAX_CHARS: Final = 200
"""Of a credential; a slug has at most 63, an epoch 19, a mac 43."""


@dataclass(frozen=True, slots=True)
class TokenClaim:
    """Whose reports a credential is good for."""

    slug: Slug
    epoch: Epoch


def issue(key: bytes, claim: TokenClaim) -> str:
    """The credential of this claim under this key."""
    return f"{PREFIX}.{claim.slug}.{claim.epoch}.{_mac(key, claim)}"


def claim_of(keys: Sequence[bytes], given: str) -> TokenClaim | None:
    """What the credential is good for; None when none of the keys made it. Constant time per key."""
    claim = claimed(given)
    if claim is None:
        return None
    mac = given.rpartition(".")[2]
    good = False
    for key in keys:
        good |= hmac.compare_digest(_mac(key, claim), mac)
    return claim if good else None


def claimed(given: str) -> TokenClaim | None:
    """What the credential says it is good for, whoever made it; None when it is no credential. Not verified:
    for messages only."""
    if len(given) > MAX_CHARS or not given.isascii():
        return None
    prefix, *parts = given.split(".")
    if prefix != PREFIX or len(parts) != 3:
        return None
    slug, number, _ = parts
    try:
        epoch = whole(number)
    except ValueError:
        return None
    # One way to write a number: "01" would be another text with the same mac.
    return TokenClaim(Slug(slug), Epoch(epoch)) if is_slug(slug) and str(epoch) == number else None


def _mac(key: bytes, claim: TokenClaim) -> str:
    digest = hmac.new(key, f"v1|{claim.slug}|{claim.epoch}".encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
