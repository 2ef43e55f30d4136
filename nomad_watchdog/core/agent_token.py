"""An agent's credential: valid only for the reports of one device at one epoch.

``wda1.<slug>.<epoch>.<mac>``, where mac is HMAC-SHA256(key, "v1|slug|epoch") as base64url without padding. The slug
and the epoch are in clear text, so that a forged credential is refused before a body is read, and one for another
device can be told apart from a forged one. Nothing is stored: every replica that has the key can check a credential.
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
"""Maximum length of a credential; a slug has at most 63 characters, an epoch 19, a mac 43."""


@dataclass(frozen=True, slots=True)
class TokenClaim:
    """The device and epoch that a credential is valid for."""

    slug: Slug
    epoch: Epoch


def issue(key: bytes, claim: TokenClaim) -> str:
    """The credential for this claim, made with this key."""
    return f"{PREFIX}.{claim.slug}.{claim.epoch}.{_mac(key, claim)}"


def claim_of(keys: Sequence[bytes], given: str) -> TokenClaim | None:
    """The claim of a credential; None if it was made with none of the keys. Constant time per key."""
    claim = claimed(given)
    if claim is None:
        return None
    mac = given.rpartition(".")[2]
    good = False
    for key in keys:
        good |= hmac.compare_digest(_mac(key, claim), mac)
    return claim if good else None


def claimed(given: str) -> TokenClaim | None:
    """The unverified claim of a credential, for messages only; None = not a credential."""
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
    # Reject "01": it would be another text with the same mac.
    return TokenClaim(Slug(slug), Epoch(epoch)) if is_slug(slug) and str(epoch) == number else None


def _mac(key: bytes, claim: TokenClaim) -> str:
    digest = hmac.new(key, f"v1|{claim.slug}|{claim.epoch}".encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
