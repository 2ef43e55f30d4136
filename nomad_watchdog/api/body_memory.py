"""Memory for the bodies of requests: bounded in total, with a share for each rank of callers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.api.connection_limits import Place, Rank

MAX_UNSIGNED: Final = 64 * 1024
"""Bytes of a body whose sender is known only when it has arrived: one event of a gateway."""
PATIENCE_S: Final = 1.0
"""A body that takes longer to arrive makes room for others."""
_SHARES: Final = {Rank.UNAUTHENTICATED: 0.25, Rank.KNOWN: 0.75, Rank.OPERATOR: 1.0}
"""The part of all that may be in use for a body of this rank to be taken."""


@dataclass(slots=True)
class BodyMemory:
    """Bytes that were promised to bodies. A body counts from its headers until its request is answered."""

    most: int
    now: Callable[[], float]
    """Monotonic seconds."""
    _held: OrderedDict[Place, tuple[int, float]] = field(default_factory=OrderedDict)
    """Place → bytes, and since when; the oldest first."""
    _used: int = 0

    @property
    def used(self) -> int:
        return self._used

    def take(self, place: Place, rank: Rank, size: int) -> bool:
        """Whether a body of this size, of a caller of this rank, may be read. Those that arrive slowly are given up
        for it, with their connections, unless their rank is higher."""
        limit = self.most * _SHARES[rank]
        for other, (_, since) in list(self._held.items()) if self._used + size > limit else ():
            slow = not other.busy and self.now() - since > PATIENCE_S
            if slow and other.rank <= rank:
                self.give(other)
                other.close()
            if self._used + size <= limit:
                break
        if self._used + size > limit:
            return False
        self._held[place] = (size, self.now())
        self._used += size
        return True

    def give(self, place: Place) -> None:
        """The request was answered."""
        size, _ = self._held.pop(place, (0, 0.0))
        self._used -= size
