"""The pressure of hosts: which agents read it, and the newest reading of each host.

In memory only. Replicas send each other the reports that contain the readings, so each of them knows all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import nsmallest
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.host_pressure import HostPressure, HostUsage
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    DeviceRecord,
    Monotonic,
    Placement,
    PlacementState,
    Presence,
    Report,
)

READERS: Final = 3
"""Number of agents per host that read its pressure: one may be replaced or cut off."""
CHOOSE_EVERY_S: Final = 15.0
"""Minimum time between two choices of these agents, each of which reads all placements."""
UNREADABLE_S: Final = 3600.0
"""Time after which an agent that could not read anything is asked again."""
MAX_HOSTS: Final = 10_000
"""Maximum number of hosts with a reading. Those of others are discarded."""
_PRESENT: Final = Presence.PRESENT
_RUNNING: Final = PlacementState.RUNNING


USAGE_STALE_S: Final = 90.0
"""Age at which the scheduler's statistics of a host no longer count."""


@dataclass(frozen=True, slots=True)
class UsageReading:
    """What the scheduler's statistics show of a host whose pressure can't be read."""

    usage: HostUsage
    received_at: Monotonic


@dataclass(frozen=True, slots=True)
class HostReading:
    """What an agent has read."""

    pressure: HostPressure
    received_at: Monotonic


class HostPressures:
    """The newest readings of one fleet. `stale_s`: returns the age in seconds at which a reading no longer counts."""

    def __init__(
        self,
        records: Mapping[Slug, DeviceRecord],
        placements: Mapping[Slug, tuple[Placement, ...]],
        clock: Clock,
        stale_s: Callable[[], float],
    ) -> None:
        self._records, self._placements = records, placements
        self._clock, self._stale_s = clock, stale_s
        self._readings: dict[str, HostReading] = {}
        self._usages: dict[str, UsageReading] = {}
        self._readers: frozenset[Slug] = frozenset()
        self._chosen_at = float("-inf")
        self._failed_at: dict[Slug, Monotonic] = {}
        """Readers that could not read anything, and when they reported that."""

    def asks(self, slug: Slug) -> bool:
        """Whether the agent of this device is to read the pressure of its host."""
        now = self._clock.monotonic()
        if now - self._chosen_at >= CHOOSE_EVERY_S:
            self._choose(now)
        failed_at = self._failed_at.get(slug)
        return slug in self._readers and (failed_at is None or now - failed_at >= UNREADABLE_S)

    def reported(self, report: Report) -> None:
        """Store the reading of an accepted report, if it has one."""
        if report.pressure is None:
            return
        now = self._clock.monotonic()
        host = self._host_of(report)
        if not host:
            return
        if report.pressure.is_known:
            self._failed_at.pop(report.slug, None)
        else:
            self._failed_at[report.slug] = now
            before = self._readings.get(host)
            if before is not None and before.pressure.is_known and not self.is_stale(before):
                return  # another agent of the host can read it
        if host in self._readings or len(self._readings) < MAX_HOSTS:
            self._readings[host] = HostReading(report.pressure, now)

    def hosts(self) -> list[str]:
        """The names of all hosts with a reading, in order."""
        return sorted(self._readings)

    def reading(self, host: str) -> HostReading | None:
        """The newest reading of a host, which may be stale; None = there is none."""
        return self._readings.get(host)

    def fresh(self, host: str) -> HostReading | None:
        """The newest reading of a host, unless it is stale or contains nothing."""
        found = self._readings.get(host)
        if found is None or not found.pressure.is_known or self.is_stale(found):
            return None
        return found

    def blind(self) -> list[str]:
        """The hosts whose agents report that the pressure can't be read, in order."""
        return [
            host
            for host, one in sorted(self._readings.items())
            if not one.pressure.is_known and not self.is_stale(one)
        ]

    def used(self, found: Mapping[str, HostUsage]) -> None:
        """Take the scheduler's statistics of hosts, in place of earlier ones. Empty ones are left out."""
        now = self._clock.monotonic()
        self._usages = {host: UsageReading(one, now) for host, one in found.items() if one.values()}

    def usage(self, host: str) -> UsageReading | None:
        """The scheduler's statistics of a host, unless they are stale or its pressure is known."""
        found = self._usages.get(host)
        if found is None or self.fresh(host) is not None:
            return None
        is_fresh = self._clock.monotonic() - found.received_at <= USAGE_STALE_S
        return found if is_fresh else None

    def is_stale(self, reading: HostReading) -> bool:
        """Whether the reading is too old to count. A reason why nothing can be read stays until it is checked again."""
        limit_s = self._stale_s() if reading.pressure.is_known else 2 * UNREADABLE_S
        return self._clock.monotonic() - reading.received_at > limit_s

    def _host_of(self, report: Report) -> str:
        """The host of the agent as its scheduler reports it; "" = not known."""
        for one in self._placements.get(report.slug, ()):
            if one.epoch == report.epoch and report.instance in one.instances:
                return one.node
        return ""

    def _choose(self, now: Monotonic) -> None:
        """Choose the readers again: of each host the present devices with the lowest hashes."""
        found: defaultdict[str, list[Slug]] = defaultdict(list)
        for slug, placements in self._placements.items():
            record = self._records.get(slug)
            if record is None or record.presence is not _PRESENT:
                continue
            for one in placements:
                if one.state is _RUNNING and one.epoch == record.epoch and one.node:
                    found[one.node].append(slug)
        readers = (slug for some in found.values() for slug in nsmallest(READERS, some, key=_hash))
        self._readers = frozenset(readers)
        self._chosen_at = now
        self._readings = {k: v for k, v in self._readings.items() if k in found}
        self._failed_at = {k: v for k, v in self._failed_at.items() if k in self._readers}


def _hash(slug: Slug) -> str:
    """A slug ends with a hash of the device's id (`ids.slug_of`)."""
    return slug[-20:]
