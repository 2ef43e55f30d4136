"""(penalty, time) → flapping or not: changes of presence that come too close together.

As routers damp a route (RFC 2439): each change adds 1 to a penalty that halves every half-life. At
`flap_changes` the device flaps, and it does so until the penalty has fallen to half of that. The penalty
is capped, so that the hold ends at most `MAX_HALF_LIVES` after the last change, however many there were.

Only what is done about a wish waits, never the wish: the record always says what was asked last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nomad_watchdog.model import Monotonic, PresenceRules

MAX_HALF_LIVES: Final = 2
"""From the cap to where flapping ends."""
_FORGOTTEN: Final = 0.05
"""Below so little a penalty is no more worth its memory."""


@dataclass(frozen=True, slots=True)
class FlapDamper:
    """The penalty of one device as of `at`."""

    penalty: float
    at: Monotonic
    flapping: bool = False


def penalty_at(flap: FlapDamper, rules: PresenceRules, now: Monotonic) -> float:
    """What is left of the penalty. A `now` before the last change counts as no time."""
    halved: float = 0.5 ** (max(0.0, now - flap.at) / rules.flap_half_life_s)
    return flap.penalty * halved


def changed(flap: FlapDamper | None, rules: PresenceRules, now: Monotonic) -> FlapDamper | None:
    """After one more change of presence; None when nothing is to be remembered."""
    if rules.flap_changes <= 0:
        return None
    left = penalty_at(flap, rules, now) if flap is not None else 0.0
    most = rules.flap_changes / 2 * 2**MAX_HALF_LIVES
    penalty = min(left + 1.0, most)
    # The changes of a real burst decay a little between one and the next: k of them are k.
    flaps = (flap is not None and is_flapping(flap, rules, now)) or (
        penalty > rules.flap_changes - 0.5
    )
    return FlapDamper(penalty, now, flaps)


def is_flapping(flap: FlapDamper, rules: PresenceRules, now: Monotonic) -> bool:
    """Whether the device still flaps."""
    return flap.flapping and penalty_at(flap, rules, now) > rules.flap_changes / 2


def is_forgotten(flap: FlapDamper, rules: PresenceRules, now: Monotonic) -> bool:
    """Whether nothing of it matters any more."""
    return not is_flapping(flap, rules, now) and penalty_at(flap, rules, now) < _FORGOTTEN
