"""Token buckets, one a client: so that one client can't take everybody's share of the API.

Pure: the caller gives the time. The table is bounded; whoever is forgotten begins with a full bucket,
and the one that was quiet for longest, whose bucket is the fullest, is forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

MOST_CLIENTS: Final = 16_384


@dataclass(slots=True)
class Buckets:
    """`rate` requests a second for long, `burst` at once."""

    rate: float
    burst: float
    most: int = MOST_CLIENTS
    _levels: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)
    """Client → (requests left, when that was), the most recent last."""

    def take(self, client: str, now: float) -> float:
        """0 when the request may pass, else the seconds until one may. A refused one costs nothing."""
        left, then = self._levels.pop(client, (self.burst, now))
        left = min(self.burst, left + max(0.0, now - then) * self.rate)
        allowed = left >= 1.0
        self._levels[client] = (left - 1.0 if allowed else left, now)
        if len(self._levels) > self.most:
            self._levels.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self.rate

    def __len__(self) -> int:
        return len(self._levels)
