"""What is remembered of a device between two judgements of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from nomad_watchdog.model import (
    Monotonic,
    Placement,
    PlacementState,
    Report,
    Unheard,
    Verdict,
    VerdictState,
)

RESTARTS_EVERY_S: Final = 60.0
"""Restarts of one device's agent are published at most this often; those in between are counted in the next event."""


class Counted(NamedTuple):
    """What the totals count of one device."""

    state: VerdictState | None = None
    unheard: Unheard | None = None
    unlisted: bool = False
    settled: bool = False


@dataclass(slots=True)
class Track:
    """What is remembered of a device between two judgements."""

    waiting_since: Monotonic
    quiet_since: Monotonic
    """See `verdict.Evidence`."""
    epoch: int = -1
    """The record's epoch when it was last judged."""
    judged: tuple[int, Monotonic] = (-1, Monotonic(float("-inf")))
    """The record's index when it was last judged, and when that was."""
    verdict: Verdict | None = None
    """As last judged; None = not judged yet."""
    agent: VerdictState | None = None
    """The state without the stored condition."""
    ready: bool = False
    unheard: Unheard | None = None
    unlisted: bool = False
    unlisted_since: Monotonic | None = None
    since: Monotonic = field(default=Monotonic(0.0))
    suspect_since: Monotonic | None = None
    report: Report | None = None
    overruled_at: Monotonic = field(default=Monotonic(float("-inf")))
    """When another replica's condition arrived; older reports do not change it."""
    is_conclusive: bool = False
    """It has had a state other than `starting` since this control plane began."""
    confirmed: int = -1
    """The epoch whose agent has decided about the condition."""
    carried: VerdictState | None = None
    """The verdict of the last run about the agent that still runs, until a report of it arrives."""

    renewals: int = 0
    """How often the reason of the condition has been replaced since it began."""
    renew_at: Monotonic = field(default=Monotonic(0.0))
    """When it may be replaced again."""
    was_watched: bool = False
    """An agent has been ready since this control plane began, or before."""
    run: tuple[object, ...] = ()
    """The run of the agent that was last seen running."""
    running_since: Monotonic = field(default=Monotonic(0.0))
    restarts: tuple[int, int] = (-1, 0)
    """Epoch, and the restarts of its placement that are known and published."""
    restarted_at: Monotonic = field(default=Monotonic(float("-inf")))
    """When a restart was last published."""
    died_of: str = ""
    """Why the scheduler restarts, or last restarted, the agent; "" = it gives no reason."""

    @property
    def state(self) -> VerdictState | None:
        """As last judged; None = not judged yet."""
        return None if self.verdict is None else self.verdict.state

    def ran(self, placement: Placement | None, now: Monotonic) -> None:
        """Note when this run of the current epoch's placement was first seen."""
        if placement is None or placement.state is not PlacementState.RUNNING:
            return
        run = (placement.epoch, placement.instances, placement.restarts)
        if run != self.run:
            self.run, self.running_since = run, now

    def restarted(self, placement: Placement | None, now: Monotonic) -> int:
        """The number of restarts of the current epoch's placement to publish now."""
        if placement is None:
            return 0
        if placement.state is PlacementState.RESTARTING and placement.reason:
            self.died_of = placement.reason
        epoch, known = self.restarts
        if epoch != placement.epoch or placement.restarts < known:
            # Restarts before the placement was first seen are not new.
            self.restarts = (placement.epoch, placement.restarts)
            return 0
        new = placement.restarts - known
        if not new or now - self.restarted_at < RESTARTS_EVERY_S:
            return 0
        self.restarts, self.restarted_at = (placement.epoch, placement.restarts), now
        return new

    @property
    def counted(self) -> Counted:
        """For the totals."""
        return Counted(self.state, self.unheard, self.unlisted, self.settled)

    @property
    def settled(self) -> bool:
        """Whether no agent is missing: it is ready, or the device has left."""
        return self.ready or self.state is VerdictState.DEPARTED
