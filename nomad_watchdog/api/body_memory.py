"""Memory for the bodies of requests: limited in total, with a share for each rank of callers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.api.connection_limits import Place, Rank

MAX_UNSIGNED: Final = 64 * 1024
"""Maximum bytes of a body whose signature can be verified only after it was read: one event of a gateway."""
SLOW_S: Final = 1.0
"""A body that takes longer to arrive makes room for others."""
_SHARES: Final = {Rank.UNAUTHENTICATED: 0.25, Rank.KNOWN: 0.75, Rank.OPERATOR: 1.0}
"""Rank → the share of the memory that may be in use when a body of this rank is accepted."""


@dataclass(slots=True)
class BodyMemory:
    """Bytes reserved for bodies, from the headers of a request until its response."""

    most: int
    now: Callable[[], float]
    """Monotonic seconds."""
    _reserved: OrderedDict[Place, tuple[int, float]] = field(default_factory=OrderedDict)
    """Place → bytes, and since when; the oldest first."""
    _used: int = 0

    @property
    def used(self) -> int:
        return self._used

    def reserve(self, place: Place, rank: Rank, size: int) -> bool:
        """Reserve memory for a body of this size from a caller of this rank. False: there is not enough. Bodies that
        arrive slowly make room, unless their rank is higher: their connections are closed."""
        limit = self.most * _SHARES[rank]
        for other, (_, since) in list(self._reserved.items()) if self._used + size > limit else ():
            slow = not other.busy and self.now() - since > SLOW_S
            if slow and other.rank <= rank:
                self.release(other)
                other.close()
            if self._used + size <= limit:
                break
        if self._used + size > limit:
            return False
        self._reserved[place] = (size, self.now())
        self._used += size
        return True

    def release(self, place: Place) -> None:
        """The request was answered."""
        size, _ = self._reserved.pop(place, (0, 0.0))
        self._used -= size
