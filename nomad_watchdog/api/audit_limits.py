"""The limit of audit events per token, and the number of those left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.core.rate_limit import Buckets

PER_S: Final = 20.0
AT_ONCE: Final = 10_000
REPORT_EVERY_S: Final = 60.0


@dataclass(slots=True)
class AuditLimits:
    """AT_ONCE events per token, and PER_S per second over time. The log has all changes."""

    buckets: Buckets = field(default_factory=lambda: Buckets(PER_S, AT_ONCE))
    left_out: Counter[str] = field(default_factory=Counter)
    """Per token, since the last event about them."""

    def admits(self, actor: str, now: float) -> bool:
        """Whether an event may be stored; if not, it is counted as left out."""
        if not self.buckets.take(actor, now):
            return True
        self.left_out[actor] += 1
        return False
