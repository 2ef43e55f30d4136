"""Decides when to read the scheduler again, and how much of it. Pure: no clock, no I/O.

A full read costs the scheduler most when it has the least capacity to spare: in a storm of starts. There are
therefore two kinds of news. Urgent news may require an action (an agent ended, a node is gone) and is always read
soon. Calm news only confirms our own actions (a start was placed, it runs) and can wait for a full read that is worth
its cost.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Monotonic

NARROW: Final = 48
"""Maximum number of devices in a narrow read; for more, a full read is cheaper."""
PRICE: Final = 20
"""Full reads that are not urgent take at most 1/PRICE of the time."""
MIN_S: Final = 0.5
"""Minimum wait after a full read, however cheap it was, in seconds."""
URGENT_S: Final = 5.0
"""Maximum wait for a full read if more devices are urgent than a narrow read takes, in seconds."""
CALM_S: Final = 30.0
"""Maximum wait for a full read for calm news, in seconds since the oldest of it."""
REST_S: Final = 0.2
"""Wait before a narrow read for calm news, in seconds: the first starts of a storm are not worth one."""
QUIET_S: Final = 1.0
"""A full read for calm news waits until no news arrived for this long, in seconds: during a storm it would be
incomplete, and would use capacity that the scheduler needs."""


@dataclass(frozen=True, slots=True)
class Read:
    """What to read now."""

    only: frozenset[Slug] | None
    """None = everything."""
    reason: str = ""


@dataclass(slots=True)
class ResyncSchedule:
    """What is to be read. `resync_s`: maximum time between full reads, in seconds."""

    resync_s: float
    full_at: Monotonic | None = None
    """When the last full read ended."""
    _cost_s: float = 0.0
    _all: str = "start"
    _hurry: bool = False
    _urgent: set[Slug] = field(default_factory=set)
    _calm: set[Slug] = field(default_factory=set)
    """Contains no urgent devices."""
    _calm_since: float = 0.0
    _calm_last: float = 0.0

    def devices(self, slugs: AbstractSet[Slug], now: Monotonic, *, calm: bool) -> None:
        """Record news of these devices. `calm`: it only confirms what is expected."""
        if calm:
            if not self._calm:
                self._calm_since = now
            self._calm_last = now
            self._calm |= slugs - self._urgent
        else:
            self._urgent |= slugs
            self._calm -= slugs

    def everything(self, reason: str, *, hurry: bool = False) -> None:
        """Request a full read, because news may have been missed. `hurry`: do not wait until it is worth its cost."""
        self._all = self._all or reason
        self._hurry = self._hurry or hurry

    def take(self, now: Monotonic) -> Read | None:
        """The next read, which is removed from the schedule; None = nothing to read yet."""
        if self._full_due(now) <= now:
            look = Read(None, self._all or ("news" if self._news else "timer"))
            self._all, self._hurry = "", False
            self._urgent, self._calm = set(), set()
            return look
        if only := self._narrow(now):
            self._urgent -= only
            self._calm -= only
            return Read(only, "news")
        return None

    def wait_s(self, now: Monotonic) -> float:
        """Seconds until `take` returns a read, if no news arrives before."""
        if self._narrow(now):
            return 0.0
        due = self._full_due(now)
        if self._calm and self._news <= NARROW:
            due = min(due, self._calm_since + REST_S)
        return max(0.0, due - now)

    def done(self, look: Read, began: Monotonic, now: Monotonic) -> None:
        """Record that a read succeeded."""
        if look.only is None:
            self.full_at, self._cost_s = now, now - began

    def failed(self, look: Read) -> None:
        """Record that a read failed: what it covers is read again."""
        if look.only is not None:
            self._urgent |= look.only
            self._calm -= look.only
        self.everything("error")

    def _narrow(self, now: Monotonic) -> frozenset[Slug]:
        # Counted before anything is copied: this runs at every start of a storm.
        if self._news <= NARROW and (self._urgent or now >= self._calm_since + REST_S):
            return frozenset(self._urgent | self._calm)
        return frozenset(self._urgent) if len(self._urgent) <= NARROW else frozenset()

    @property
    def _news(self) -> int:
        return len(self._urgent) + len(self._calm)

    def _full_due(self, now: Monotonic) -> float:
        if self.full_at is None or self._hurry:
            return now
        price_s = max(MIN_S, PRICE * self._cost_s)
        resync_at = self.full_at + self.resync_s
        if self._all or len(self._urgent) > NARROW:
            return min(self.full_at + min(price_s, URGENT_S), resync_at)
        if self._news > NARROW:
            quiet_at = min(self._calm_last + QUIET_S, self._calm_since + CALM_S)
            return min(max(self.full_at + min(price_s, CALM_S), quiet_at), resync_at)
        return resync_at
