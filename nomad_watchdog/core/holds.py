"""Puts a change that would affect too many devices at once on hold until it is confirmed (S7).

A dead gateway, a clock that stopped, a truncated inventory or a registry that lost records looks like a fleet that
left. There are two kinds of such changes: stops of agents, and departures of devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from nomad_watchdog.model import Limits

Key = TypeVar("Key", bound=tuple[object, ...])
"""Identifies one change."""


@dataclass(frozen=True, slots=True)
class HoldKind:
    """A kind of change that can be put on hold, in words."""

    name: str
    """In the plural, as in the command that confirms them."""
    event: str
    """Prefix of its kinds of events."""
    change: str
    """Follows the numbers of devices: what would happen to them."""
    confirmation: str
    """What makes such a change possible."""


STOPS: Final = HoldKind(
    "stops", "breaker", "agents would be stopped in one pass", "a second read that agrees"
)
DEPARTURES: Final = HoldKind(
    "departures", "departures", "devices would leave at once", "an operator's confirmation"
)


@dataclass(frozen=True, slots=True)
class HoldDecision(Generic[Key]):
    """Which changes may be made now, which are put on hold, and why."""

    go: frozenset[Key]
    held: frozenset[Key] = frozenset()
    reason: str = ""


def decide(
    kind: HoldKind,
    wanted: AbstractSet[Key],
    confirmed: AbstractSet[Key],
    limits: Limits,
    *,
    total: int,
    recent: int = 0,
) -> HoldDecision[Key]:
    """`total`: number of things that could change, including the wanted ones; `recent`: number of unconfirmed
    changes that were made for the same cause shortly before.

    Confirmed changes are never held, so that a slow trickle of new ones does not delay them."""
    fresh = frozenset(wanted - confirmed)
    allowed = max(limits.breaker_min, int((total + recent) * limits.breaker_fraction))
    if not fresh or len(fresh) + recent <= allowed:
        return HoldDecision(frozenset(wanted))
    reason = (
        f"{len(fresh) + recent} of {total + recent} {kind.change}; at most {allowed} are allowed "
        f"without {kind.confirmation}"
    )
    return HoldDecision(frozenset(wanted & confirmed), fresh, reason)


def hold_id(held: Iterable[Key]) -> str:
    """Twelve hexadecimal digits that identify exactly these changes; "" = there are none."""
    text = "\n".join(sorted(" ".join(map(str, key)) for key in held))
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""


def confirm_command(kind: HoldKind, held_id: str) -> str:
    """What an operator runs if the held changes are intended."""
    return f"if it is intended: nomad-watchdog {kind.name} confirm {held_id}"


@dataclass(slots=True)
class Hold(Generic[Key]):
    """The changes of one kind that are on hold, why, and those that are confirmed."""

    held: frozenset[Key] = field(default_factory=frozenset)
    reason: str = ""
    confirmed: frozenset[Key] = field(default_factory=frozenset)

    @property
    def held_id(self) -> str:
        """Identifies what is held, so that an operator confirms only what was displayed; "" = nothing is held."""
        return hold_id(self.held)

    def confirm(self) -> int:
        """An operator confirms all held changes. Returns how many."""
        self.confirmed |= self.held
        return len(self.held)
