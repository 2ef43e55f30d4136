"""Token buckets, one per client, so that one client can't use up the API for all others.

Pure: the caller passes the time. The table is bounded: the client that was idle longest, whose bucket is the fullest,
is removed first. A removed client starts again with a full bucket.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

MAX_CLIENTS: Final = 16_384


@dataclass(slots=True)
class Buckets:
    """`rate`: average units per second; `burst`: maximum units at once. A unit is a request, an event, or a second of
    work."""

    rate: float
    burst: float
    most: int = MAX_CLIENTS
    _levels: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)
    """Client → (units left, at this time), the most recent last."""

    def take(self, client: str, now: float) -> float:
        """Take one unit. Returns 0 if the request may pass, else the seconds until one may. A refused request costs
        nothing."""
        left = self.left(client, now)
        allowed = left >= 1.0
        self._keep(client, left - 1.0 if allowed else left, now)
        return 0.0 if allowed else (1.0 - left) / self.rate

    def spend(self, client: str, cost: float, now: float) -> None:
        """Charge for completed work; the balance may become negative."""
        self._keep(client, self.left(client, now) - cost, now)

    def owes(self, client: str, now: float) -> float:
        """0 if anything is left, else the seconds until something is."""
        left = self.left(client, now)
        return 0.0 if left > 0.0 else max(-left / self.rate, 0.001)

    def left(self, client: str, now: float) -> float:
        """Units left in the bucket; negative if more was spent."""
        left, then = self._levels.get(client, (self.burst, now))
        return min(self.burst, left + max(0.0, now - then) * self.rate)

    def _keep(self, client: str, left: float, now: float) -> None:
        self._levels.pop(client, None)
        self._levels[client] = (left, now)
        if len(self._levels) > self.most:
            self._levels.popitem(last=False)

    def __len__(self) -> int:
        return len(self._levels)
