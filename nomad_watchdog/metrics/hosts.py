"""Metrics of the hosts. The label `host` is the name that the scheduler has for a host, and their number is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from nomad_watchdog.core.host_load import Load
from nomad_watchdog.core.relief import ReliefProgress
from nomad_watchdog.host_pressure import Resource
from nomad_watchdog.metrics.labels import OTHER, known

MAX_HOSTS: Final = 1_000
"""Maximum number of hosts with series."""

RELIEF: Final = (
    "begun",
    "would_move",
    *(
        one.value
        for one in ReliefProgress
        if one not in (ReliefProgress.WAITING, ReliefProgress.ON_WAY)
    ),
    OTHER,
)
"""What happened to a move: it began, would have begun in a dry run, or how it ended."""

Ratio = tuple[str, Resource, float]
"""Host, resource, and the pressure on it, 0 to 1."""


class HostMetrics(Collector):
    """The pressure is read at each scrape, so that a host that is gone, or without a fresh reading, has no series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ratios: Callable[[], Iterable[Ratio]] = tuple
        """Returns the fresh readings in the order of the hosts."""
        self.usages: Callable[[], Iterable[Ratio]] = tuple
        """Returns the scheduler's statistics of hosts without such a reading."""
        registry.register(self)
        self._moves = Counter(
            "nomad_watchdog_relief_moves",
            "Moves from overloaded hosts.",
            ("outcome",),
            registry=registry,
        )
        self._moving = Gauge(
            "nomad_watchdog_relief_moving",
            "Moves from overloaded hosts in progress.",
            registry=registry,
        )
        self._loads = Gauge(
            "nomad_watchdog_relief_hosts",
            "Hosts with a reading, by load.",
            ("load",),
            registry=registry,
        )
        self._impossible = Gauge(
            "nomad_watchdog_relief_impossible",
            "1: hosts are overloaded, and no other host is calm.",
            registry=registry,
        )
        self._waiting = Gauge(
            "nomad_watchdog_drain_waiting_hosts",
            "Hosts that agents should leave and none can leave.",
            registry=registry,
        )
        for outcome in RELIEF:
            self._moves.labels(outcome)
        self.relief(0, {})

    def relief_moves(self, outcome: str) -> None:
        """Count a move by what happened to it."""
        self._moves.labels(known(outcome, RELIEF)).inc()

    def drains_waiting(self, count: Callable[[], int]) -> None:
        """`count`: called at each scrape; returns the number of hosts that agents should leave and cannot."""
        self._waiting.set_function(count)

    def relief(self, moving: int, loads: Mapping[str, int], *, impossible: bool = False) -> None:
        """Numbers of moves in progress and of hosts by load, and whether hosts are overloaded while no other host is
        calm; 0 on a replica that does not decide."""
        self._moving.set(moving)
        self._impossible.set(impossible)
        for load in Load:
            self._loads.labels(load.value).set(loads.get(load.value, 0))

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The series of one scrape."""
        for name, text, ratios in (
            (
                "pressure",
                "Share of the last 60 seconds in which a task of the host waited for the resource.",
                self.ratios(),
            ),
            (
                "usage",
                "Share of the capacity in use by the scheduler's statistics, of hosts without pressure.",
                self.usages(),
            ),
        ):
            found = GaugeMetricFamily(
                f"nomad_watchdog_host_{name}_ratio", text, labels=("host", "resource")
            )
            for host, resource, ratio in islice(ratios, MAX_HOSTS * len(Resource)):
                found.add_metric((host, resource.value), ratio)
            yield found
