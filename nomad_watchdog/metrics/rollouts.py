"""Metrics of roll-outs."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Gauge


class RolloutMetrics:
    """`gauge`: makes a gauge by its name and help text."""

    def __init__(self, gauge: Callable[[str, str], Gauge]) -> None:
        self._given_up = gauge("rollouts_given_up", "Classes whose new version was given up.")
        self._running = gauge("rollouts_in_progress", "Classes with a roll-out in steps.")
        self._outages = gauge(
            "rollout_outages",
            "Devices that are offline or degraded since they have a version whose step has not passed.",
        )

    def classes(self, *, given_up: int, in_progress: int) -> None:
        """Numbers of classes whose roll-out was given up or halted, and that have one in steps."""
        self._given_up.set(given_up)
        self._running.set(in_progress)

    def outages(self, count: int) -> None:
        """Number of devices that are not counted by their verdict, but here."""
        self._outages.set(count)
