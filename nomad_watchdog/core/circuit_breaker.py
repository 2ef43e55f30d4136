"""Circuit breaker: when calls fail for one device after another, calls for all devices become less frequent. The
number of calls during an outage must not grow with the fleet (S9).

Pure: the caller passes the time and the jitter. Closed → `TOGETHER` devices failed without an answer in between →
open → half open, one call at a time per worker → closed by the first answer, or open for longer. A single failing
device does not open the circuit: it has its own back-off and delays no other device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.ids import Slug

TOGETHER: Final = 4
"""Number of different devices that must fail in a row before the server is considered at fault."""
FIRST_S: Final = 0.5
LONGEST_S: Final = 15.0
MAX_RETRY_AFTER_S: Final = 60.0
"""Maximum delay that is accepted from a server, in seconds: its header may be wrong, and devices wait."""


@dataclass(slots=True)
class CircuitBreaker:
    """State of the server that receives all actions."""

    _failed: set[Slug] = field(default_factory=set)
    """Devices that failed since the last answer; at most `TOGETHER`."""
    _times: int = 0
    _until: float = 0.0

    def allowance(self, most: int, now: float) -> int:
        """Number of actions that may start at once: `most`, 1 to test whether the server answers again, or 0."""
        if len(self._failed) < TOGETHER:
            return most
        return 0 if now < self._until else 1

    def wait_s(self, now: float) -> float:
        """Seconds until an action may start; 0 = now."""
        return max(0.0, self._until - now) if len(self._failed) >= TOGETHER else 0.0

    def answered(self) -> None:
        """Record that the server answered, even if it refused one device."""
        self._failed.clear()
        self._times = 0

    def failed(self, slug: Slug, now: float, retry_after_s: float, jitter: float) -> bool:
        """Count a failure that may be the server's fault. Returns true if it opens the circuit, or opens it again.

        `retry_after_s`: delay that the server requested, 0 = none; `jitter`: from 0 to 1.
        """
        if len(self._failed) < TOGETHER:
            self._failed.add(slug)
        if len(self._failed) < TOGETHER or now < self._until:
            return False  # calls in flight when it opened do not count
        ceiling = min(LONGEST_S, FIRST_S * 2.0 ** min(self._times, 10))
        self._times += 1
        wait_s = ceiling * (0.5 + jitter / 2)
        self._until = now + max(wait_s, min(retry_after_s, MAX_RETRY_AFTER_S))
        return True
