"""Detects flapping devices: changes of presence that come too close together.

This works like route flap damping (RFC 2439): each change adds 1 to a penalty that halves every half-life. A device
starts to flap at `flap_changes` and stops when the penalty has fallen to half of that. The penalty is capped, so that
flapping ends at most `MAX_HALF_LIVES` half-lives after the last change.

Flapping delays only actions, never the desired state: the record always has the last request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nomad_watchdog.model import Monotonic, PresenceRules

MAX_HALF_LIVES: Final = 2
"""Number of half-lives from the cap until flapping ends."""
_FORGOTTEN: Final = 0.05
"""Penalties below this are forgotten."""


@dataclass(frozen=True, slots=True)
class FlapDamper:
    """The penalty of one device as of `at`."""

    penalty: float
    at: Monotonic
    flapping: bool = False


def penalty_at(flap: FlapDamper, rules: PresenceRules, now: Monotonic) -> float:
    """The remaining penalty. A `now` before the last change counts as no time."""
    halved: float = 0.5 ** (max(0.0, now - flap.at) / rules.flap_half_life_s)
    return flap.penalty * halved


def changed(flap: FlapDamper | None, rules: PresenceRules, now: Monotonic) -> FlapDamper | None:
    """The penalty after one more change of presence; None if flap detection is disabled."""
    if rules.flap_changes <= 0:
        return None
    left = penalty_at(flap, rules, now) if flap is not None else 0.0
    most = rules.flap_changes / 2 * 2**MAX_HALF_LIVES
    penalty = min(left + 1.0, most)
    # The penalty decays a little between the changes of a burst: k changes still count as k.
    flaps = (flap is not None and is_flapping(flap, rules, now)) or (
        penalty > rules.flap_changes - 0.5
    )
    return FlapDamper(penalty, now, flaps)


def is_flapping(flap: FlapDamper, rules: PresenceRules, now: Monotonic) -> bool:
    """Whether the device still flaps."""
    return flap.flapping and penalty_at(flap, rules, now) > rules.flap_changes / 2


def is_forgotten(flap: FlapDamper, rules: PresenceRules, now: Monotonic) -> bool:
    """Whether the device no longer flaps and its penalty can be forgotten."""
    return not is_flapping(flap, rules, now) and penalty_at(flap, rules, now) < _FORGOTTEN
