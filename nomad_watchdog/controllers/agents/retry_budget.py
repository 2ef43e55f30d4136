"""The retry budget of one device: exponential delay with full jitter, and so many starts an hour (S9)."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from nomad_watchdog.model import Limits, Monotonic


@dataclass(slots=True)
class RetryBudget:
    """Failures and starts of one device. Made on the first failure or second start; dropped when idle."""

    failures: int = 0
    last_failure_at: Monotonic = field(default=Monotonic(0.0))
    starts: deque[Monotonic] = field(default_factory=deque)

    def failed(self, limits: Limits, now: Monotonic) -> Monotonic:
        """Count a failure; the time before which nothing is tried again."""
        if now - self.last_failure_at > 2 * limits.backoff_max_s:
            self.failures = 0
        self.failures += 1
        self.last_failure_at = now
        ceiling = min(limits.backoff_max_s, limits.backoff_initial_s * 2 ** (self.failures - 1))
        # Full jitter, but never at once: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        wait = max(limits.backoff_initial_s / 2, random.uniform(0, ceiling))  # noqa: S311
        return Monotonic(now + wait)

    def is_idle(self, now: Monotonic, after_s: float) -> bool:
        """Whether nothing was counted for `after_s` seconds, so that nothing is lost with it."""
        failed_at = self.last_failure_at if self.failures else float("-inf")
        started_at = self.starts[-1] if self.starts else float("-inf")
        return now - max(failed_at, started_at) > after_s

    def may_start(self, limits: Limits, now: Monotonic) -> Monotonic:
        """`now` if the hour's budget has room, else the time at which it will have."""
        while self.starts and now - self.starts[0] > 3600.0:
            self.starts.popleft()
        if len(self.starts) < limits.starts_per_hour:
            return now
        return Monotonic(self.starts[0] + 3600.0)

    def started(self, limits: Limits, now: Monotonic) -> Monotonic:
        """Count a start; the time before which the next one may not follow.

        The first two starts of an hour are free; then each waits twice as long as the last, so that
        an agent that dies at once does not burn its hour's budget in a minute.
        """
        self.may_start(limits, now)
        self.starts.append(now)
        recent = len(self.starts)
        if recent <= 2:
            return now
        return Monotonic(
            now + min(limits.backoff_max_s, limits.backoff_initial_s * 2 ** (recent - 2))
        )
