"""How many audit events each token may cause, and how many were left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.core.rate_limit import Buckets

PER_S: Final = 20.0
AT_ONCE: Final = 10_000
SAY_EVERY_S: Final = 60.0


@dataclass(slots=True)
class AuditLimits:
    """AT_ONCE events per token, and PER_S per second over time. The log has all changes."""

    buckets: Buckets = field(default_factory=lambda: Buckets(PER_S, AT_ONCE))
    left_out: Counter[str] = field(default_factory=Counter)
    """By token, since this was last stated."""

    def admits(self, actor: str, now: float) -> bool:
        """Whether there is room for an event; one that is left out is counted."""
        if not self.buckets.take(actor, now):
            return True
        self.left_out[actor] += 1
        return False
