"""When the scheduler is looked at again, and how widely. Pure: no clock, no I/O.

A look at everything costs the scheduler most just when it has least to spare, in a storm of starts. So news
of two kinds is kept apart: what may want an action soon (an agent ended, a node is gone) is looked at soon
whatever goes on; what only confirms what we did (a start was placed, it runs) can wait for a full look that
is worth its price.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Monotonic

NARROW: Final = 48
"""More devices than this to look at are cheaper in one full look."""
PRICE: Final = 20
"""Full looks that nobody has to have now take at most one part in so many of the time."""
MIN_S: Final = 0.5
"""Shortest wait after a full look, however cheap it was."""
URGENT_S: Final = 5.0
"""Longest wait for a full look when more is urgent than a narrow look takes."""
CALM_S: Final = 30.0
"""Longest wait for a full look that only confirms, after the oldest news of it."""
REST_S: Final = 0.2
"""News that only confirms rests so long before a narrow look: the first starts of a storm are not worth one."""
QUIET_S: Final = 1.0
"""A full look that only confirms waits until so long nothing new came: while a storm goes on it would show
a part, and take from the scheduler what the storm needs."""


@dataclass(frozen=True, slots=True)
class Read:
    """What to read now."""

    only: frozenset[Slug] | None
    """None = everything."""
    reason: str = ""


@dataclass(slots=True)
class ResyncSchedule:
    """What is to be looked at. `resync_s`: everything is looked at again at least this often, in seconds."""

    resync_s: float
    full_at: Monotonic | None = None
    """When the last full look was done."""
    _cost_s: float = 0.0
    _all: str = "start"
    _hurry: bool = False
    _urgent: set[Slug] = field(default_factory=set)
    _calm: set[Slug] = field(default_factory=set)
    """Never one that is urgent."""
    _calm_since: float = 0.0
    _calm_last: float = 0.0

    def devices(self, slugs: AbstractSet[Slug], now: Monotonic, *, calm: bool) -> None:
        """There is news of these; `calm`: news that only confirms what is expected."""
        if calm:
            if not self._calm:
                self._calm_since = now
            self._calm_last = now
            self._calm |= slugs - self._urgent
        else:
            self._urgent |= slugs
            self._calm -= slugs

    def everything(self, reason: str, *, hurry: bool = False) -> None:
        """News may have been missed. `hurry`: without waiting until a full look is worth its price."""
        self._all = self._all or reason
        self._hurry = self._hurry or hurry

    def take(self, now: Monotonic) -> Read | None:
        """What to look at now, struck from the agenda; None while there is nothing to do yet."""
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
        """Seconds until `take` gives something, if there is no news before."""
        if self._narrow(now):
            return 0.0
        due = self._full_due(now)
        if self._calm and self._news <= NARROW:
            due = min(due, self._calm_since + REST_S)
        return max(0.0, due - now)

    def done(self, look: Read, began: Monotonic, now: Monotonic) -> None:
        """It was read."""
        if look.only is None:
            self.full_at, self._cost_s = now, now - began

    def failed(self, look: Read) -> None:
        """It could not be read, and is still to be looked at."""
        if look.only is not None:
            self._urgent |= look.only
            self._calm -= look.only
        self.everything("error")

    def _narrow(self, now: Monotonic) -> frozenset[Slug]:
        # Counted before anything is copied: this is asked at every start of a storm.
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
