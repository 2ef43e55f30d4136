"""When a server refuses one device after the other it is asked for all of them less often: the calls
into a storm must not grow with the fleet (S9).

Pure: the caller gives the time and the jitter. Closed → `TOGETHER` devices failed and none was answered
in between → open for a while → half open, one call at a time (of each worker) → closed by the first answer,
or open for longer. A device that fails alone opens nothing: it costs its own back-off and delays no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.ids import Slug

TOGETHER: Final = 4
"""So many different devices must fail in a row before it is the server's fault."""
FIRST_S: Final = 0.5
LONGEST_S: Final = 15.0
MAX_RETRY_AFTER_S: Final = 60.0
"""A server that asks for more is asked again all the same: the header may be wrong, and devices wait."""


@dataclass(slots=True)
class CircuitBreaker:
    """What is known of the server that all actions go to."""

    _failed: set[Slug] = field(default_factory=set)
    """Who failed since the last answer; at most `TOGETHER`."""
    _times: int = 0
    _until: float = 0.0

    def allowance(self, most: int, now: float) -> int:
        """How many actions may be begun at once: `most`, 1 to try whether it is over, or 0."""
        if len(self._failed) < TOGETHER:
            return most
        return 0 if now < self._until else 1

    def wait_s(self, now: float) -> float:
        """Seconds until something may be begun; 0 when it may be now."""
        return max(0.0, self._until - now) if len(self._failed) >= TOGETHER else 0.0

    def answered(self) -> None:
        """The server answered, be it with a refusal of one device."""
        self._failed.clear()
        self._times = 0

    def failed(self, slug: Slug, now: float, retry_after_s: float, jitter: float) -> bool:
        """Count a failure that may be the server's; true when it opens the circuit, or opens it again.

        `retry_after_s`: what the server asked for, 0 = nothing; `jitter`: from 0 to 1.
        """
        if len(self._failed) < TOGETHER:
            self._failed.add(slug)
        if len(self._failed) < TOGETHER or now < self._until:
            return False  # what was under way when it opened says nothing new
        ceiling = min(LONGEST_S, FIRST_S * 2.0 ** min(self._times, 10))
        self._times += 1
        wait_s = ceiling * (0.5 + jitter / 2)
        self._until = now + max(wait_s, min(retry_after_s, MAX_RETRY_AFTER_S))
        return True
