"""Metrics of the shards."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Gauge


class LeaseMetrics:
    """How many shards there are, and how many this replica holds."""

    def __init__(self, gauge: Callable[..., Gauge]) -> None:
        self._all = gauge("shards", "Shards of the fleet.")
        self._held = gauge("shards_held", "Shards that this replica holds.")

    def shards(self, held: int, every: int) -> None:
        """Set both."""
        self._held.set(held)
        self._all.set(every)
