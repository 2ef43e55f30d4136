"""The stops of agents that are on hold (S7), and what confirms them: a second read of both stores, or an operator."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from nomad_watchdog.core.actions import ActionKind
from nomad_watchdog.core.holds import STOPS, Hold, confirm_command
from nomad_watchdog.core.planner import NO_STOPS, Plan, Stop, stop_key
from nomad_watchdog.ids import Slug


@dataclass(slots=True)
class MassStopBreaker(Hold[Stop]):
    """The stops of one replica."""

    unregistered: int = 0
    """Held stops of devices that have no record: records may have been lost."""
    read_twice: frozenset[Stop] = NO_STOPS
    """Stops that are still held after the second read: an operator has to confirm them."""

    @property
    def wants_second_read(self) -> bool:
        """Whether a held stop was read only once."""
        return bool(self.held - self.read_twice)

    @property
    def next_step(self) -> str:
        """What the operator can run; "" = nothing is held."""
        if not self.held:
            return ""
        command = confirm_command(STOPS, self.held_id)
        if not self.unregistered:
            return command
        return (
            f"{self.unregistered} of these agents belong to devices that are not registered; if records were "
            f"lost: nomad-watchdog registry import FILE; {command}"
        )

    def update(self, plan: Plan, registered: Container[Slug] = ()) -> None:
        """Apply the stops that a new plan puts on hold. A stop that was held because its device was not registered
        needs another read once the device is registered."""
        self.held, self.reason = plan.held, plan.hold_reason
        self.unregistered = sum(stop[0] not in registered for stop in plan.held)
        self.read_twice = frozenset(
            stop for stop in self.read_twice & plan.held if stop[0] not in registered
        )
        if self.confirmed:
            # A stop stays confirmed until it is done.
            self.confirmed &= {stop_key(a) for a in plan.actions if a.kind is ActionKind.RETIRE}

    def read_again(self, held: frozenset[Stop], registered: Container[Slug]) -> None:
        """Both stores were read a second time since `held` was put on hold.

        This confirms no stop of a device that is not registered: a registry that lost its records reads the same
        every time. An operator has to confirm those.
        """
        self.read_twice = held
        # An operator may have confirmed stops during the read.
        self.confirmed |= frozenset(stop for stop in held if stop[0] in registered)
