"""Metrics of the hosts. The label `host` is the name that the scheduler has for a host, and their number is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from nomad_watchdog.host_pressure import Resource

MAX_HOSTS: Final = 1_000
"""Maximum number of hosts with series."""

Ratio = tuple[str, Resource, float]
"""Host, resource, and the pressure on it, 0 to 1."""


class HostMetrics(Collector):
    """Read at each scrape, so that a host that is gone, or without a fresh reading, has no series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ratios: Callable[[], Iterable[Ratio]] = tuple
        """Returns the fresh readings in the order of the hosts."""
        registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The series of one scrape."""
        found = GaugeMetricFamily(
            "nomad_watchdog_host_pressure_ratio",
            "Share of the last 60 seconds in which a task of the host waited for the resource.",
            labels=("host", "resource"),
        )
        for host, resource, ratio in islice(self.ratios(), MAX_HOSTS * len(Resource)):
            found.add_metric((host, resource.value), ratio)
        yield found
