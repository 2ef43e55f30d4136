"""The state of the mass-change breaker (S7): which stops are held, and whose word let them go.

The planner decides what to hold; here stands what has been confirmed meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass

from nomad_watchdog.core.planner import NO_STOPS, Plan, Stop, stop_key
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import ActionKind


def held_id(held: frozenset[Stop]) -> str:
    """Twelve hexadecimal digits that name these stops; "" = none."""
    if not held:
        return ""
    text = "\n".join(sorted(f"{slug} {epoch} {ref}" for slug, epoch, ref in held))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(slots=True)
class MassStopBreaker:
    """What is held, why, and what may go all the same."""

    held: frozenset[Stop] = NO_STOPS
    reason: str = ""
    confirmed: frozenset[Stop] = NO_STOPS
    unregistered: int = 0
    """Held stops of devices that no record is of: records may have been lost."""
    read_twice: frozenset[Stop] = NO_STOPS
    """What has had its second read, and is still held: an operator's turn."""

    @property
    def wants_second_read(self) -> bool:
        """Something is held that has been read only once."""
        return bool(self.held - self.read_twice)

    @property
    def held_id(self) -> str:
        """A name for exactly the stops that are held, so that nobody confirms others than were shown;
        "" = none."""
        return held_id(self.held)

    @property
    def mend(self) -> str:
        """What an operator types; "" = none are held."""
        if not self.held:
            return ""
        meant = f"if it is meant: nomad-watchdog stops confirm {self.held_id}"
        if not self.unregistered:
            return meant
        return (
            f"{self.unregistered} of these agents are of devices that are not registered; if records were "
            f"lost: nomad-watchdog registry import FILE; {meant}"
        )

    def settle(self, plan: Plan, registered: Container[Slug] = ()) -> None:
        """Take a new plan. A stop that was held because nobody had registered its device is worth another
        read once somebody has."""
        self.held, self.reason = plan.held, plan.hold_reason
        self.unregistered = sum(stop[0] not in registered for stop in plan.held)
        self.read_twice = frozenset(
            stop for stop in self.read_twice & plan.held if stop[0] not in registered
        )
        if self.confirmed:
            # The word holds for the stops that it was given for, until the last of them is done.
            self.confirmed &= {stop_key(a) for a in plan.actions if a.kind is ActionKind.RETIRE}

    def read_again(self, held: frozenset[Stop], registered: Container[Slug]) -> None:
        """Both stores have been read a second time since `held` was held.

        Devices that nobody has registered are not confirmed by reading twice that they are not there: a
        store that lost its keys says so every time. Those take an operator.
        """
        self.read_twice = held
        # An operator may have spoken while we were reading.
        self.confirmed |= frozenset(stop for stop in held if stop[0] in registered)

    def confirm(self) -> int:
        """An operator's word that all held stops are meant. Returns how many."""
        self.confirmed = self.held
        return len(self.held)
