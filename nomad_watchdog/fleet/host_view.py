"""The hosts of one fleet, for the API, the status page, the CLI and the metrics. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nomad_watchdog.clock import Clock
from nomad_watchdog.fleet.host_pressures import HostPressures
from nomad_watchdog.host_pressure import HostPressure, HostUsage, Resource
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Placement, PlacementState
from nomad_watchdog.schedulers import ClosedHost

OPEN = "open"
"""State of a host on which the scheduler places new agents."""


@dataclass(frozen=True, slots=True)
class HostRow:
    """One host."""

    name: str
    agents: int
    """Placements on it that are not dead."""
    state: str
    """OPEN, or `ClosedHost.state`."""
    pressure: HostPressure | None
    """None = unknown: no agent has read it, or the reading is stale."""
    age_s: float | None
    """Age of the newest reading, even if that is stale."""
    unreadable: str
    """Why the pressure, or a part of it, cannot be read."""
    usage: HostUsage | None = None
    """The scheduler's statistics, only of a host whose pressure cannot be read, and only on the leader."""


class HostView:
    """What is known of the hosts."""

    def __init__(
        self,
        placements: Mapping[Slug, tuple[Placement, ...]],
        pressures: HostPressures,
        clock: Clock,
    ) -> None:
        self._placements, self._pressures, self._clock = placements, pressures, clock
        self.closed: Mapping[str, ClosedHost] = {}
        """Hosts on which the scheduler places no new agents, by the last full snapshot."""

    def rows(self) -> list[HostRow]:
        """All hosts with agents, and all closed ones, by name."""
        agents = Counter(
            one.node
            for found in self._placements.values()
            for one in found
            if one.node and one.state is not PlacementState.DEAD
        )
        return [self._row(name, agents[name]) for name in sorted(agents.keys() | self.closed)]

    def ratios(self) -> Iterator[tuple[str, Resource, float]]:
        """The fresh readings, as shares of the last 60 seconds, 0 to 1."""
        for name in self._pressures.hosts():
            found = self._pressures.fresh(name)
            for resource in Resource:
                stall = None if found is None else found.pressure.of(resource)
                if stall is not None:
                    yield name, resource, round(stall.avg60 / 100, 6)

    def usages(self) -> Iterator[tuple[str, Resource, float]]:
        """The scheduler's statistics, as shares of the capacity, 0 to 1."""
        for name in self._pressures.hosts():
            if (found := self._pressures.usage(name)) is not None:
                for resource, value in found.usage.values().items():
                    yield name, resource, round(value / 100, 6)

    def _row(self, name: str, agents: int) -> HostRow:
        closed, newest = self.closed.get(name), self._pressures.reading(name)
        fresh, used = self._pressures.fresh(name), self._pressures.usage(name)
        shown = newest is not None and (fresh is not None or not self._pressures.is_stale(newest))
        return HostRow(
            name=name,
            agents=agents,
            state=OPEN if closed is None else closed.state,
            pressure=None if fresh is None else fresh.pressure,
            age_s=None if newest is None else self._clock.monotonic() - newest.received_at,
            unreadable=newest.pressure.unreadable if newest is not None and shown else "",
            usage=None if used is None else used.usage,
        )
