"""How many devices may be between two agent versions at a time."""

from __future__ import annotations

from collections.abc import Sequence

from nomad_watchdog.model import Action, Limits


def window(fleet: int, limits: Limits) -> int:
    """The most devices without a ready agent that a roll-out may cause or find."""
    return max(limits.replace_at_once, int(fleet * limits.replace_fraction), 1)


def admit(
    candidates: Sequence[Action], *, unready: int, fleet: int, limits: Limits
) -> tuple[Action, ...]:
    """The replacements that may begin now, first slugs first.

    `unready` counts present devices whose accepted agent is not ready, for whatever reason: a bad
    version that never gets ready fills the window and so stops its own roll-out.
    """
    room = window(fleet, limits) - unready
    if room <= 0:
        return ()
    return tuple(sorted(candidates, key=lambda action: action.slug)[:room])
