"""(last track of a host, reading) → whether the host is overloaded, calm, or neither.

A reading is the kernel's pressure or, for a host whose pressure can't be read, the use of its capacity by the scheduler's
statistics, which has thresholds of its own.
Hysteresis: a number of consecutive readings above a high threshold make a host overloaded, and as many below a low
one make it calm. Between the thresholds it stays what it was. Without a fresh reading its load is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from nomad_watchdog.host_pressure import HostPressure, HostUsage, Resource
from nomad_watchdog.model import Monotonic

READING_S: Final = 10.0
"""Minimum time between two readings that count: the kernel's average is over that time, so they are independent."""
_NEVER: Final = Monotonic(float("-inf"))


class Load(StrEnum):
    """The load of a host."""

    UNKNOWN = "unknown"
    CALM = "calm"
    OVERLOADED = "overloaded"


@dataclass(frozen=True, slots=True)
class PressureThresholds:
    """Of the pressure on one resource, percent of the last 10 seconds, or of its use, percent; `low` < `high`."""

    high: float
    low: float


@dataclass(frozen=True, slots=True)
class LoadTrack:
    """What is known of one host."""

    load: Load = Load.UNKNOWN
    above: int = 0
    """Consecutive readings above a high threshold."""
    below: int = 0
    """Consecutive readings with all resources below their low threshold."""
    readings: int = 0
    """Readings since the last move from the host ended."""
    read_at: Monotonic = _NEVER
    """When the last reading that counted was received."""
    excess: float = 0.0
    """Highest pressure in the last reading, as a multiple of its high threshold."""
    worst: str = ""
    """That pressure in words."""

    @property
    def is_calm(self) -> bool:
        """Whether agents may move there: calm, and the last reading does not show the opposite."""
        return self.load is Load.CALM and not self.above

    def after_move(self) -> LoadTrack:
        """The track from the end of a move on: only later readings show whether it helped."""
        return replace(self, above=0, readings=0)


UNKNOWN: Final = LoadTrack()


def observe(
    track: LoadTrack,
    pressure: HostPressure,
    read_at: Monotonic,
    thresholds: Mapping[Resource, PressureThresholds],
    looks: int,
) -> LoadTrack:
    """The track after a fresh reading. `looks`: number of consecutive readings for a change, 1 or more.

    The load is UNKNOWN if a resource that has thresholds was not read."""
    stalls = {one: stall.avg10 for one in Resource if (stall := pressure.of(one)) is not None}
    return _observe(track, stalls, "pressure", read_at, thresholds, looks)


def observe_usage(
    track: LoadTrack,
    usage: HostUsage,
    read_at: Monotonic,
    thresholds: Mapping[Resource, PressureThresholds],
    looks: int,
) -> LoadTrack:
    """As `observe`, of the scheduler's statistics. `thresholds`: of the use of the capacity."""
    return _observe(track, usage.values(), "usage", read_at, thresholds, looks)


def _observe(  # the parts of a reading
    track: LoadTrack,
    values: Mapping[Resource, float],
    kind: str,
    read_at: Monotonic,
    thresholds: Mapping[Resource, PressureThresholds],
    looks: int,
) -> LoadTrack:
    if read_at - track.read_at < READING_S:
        return track
    above, below, excess, worst = False, True, 0.0, ""
    if not thresholds.keys() or not thresholds.keys() <= values.keys():
        return LoadTrack(read_at=read_at)
    for resource, limit in thresholds.items():
        value = values[resource]
        above |= value >= limit.high
        below &= value <= limit.low
        if value / limit.high >= excess:
            excess = value / limit.high
            worst = f"{resource.value} {kind} {value:.0f} % (high: {limit.high:.0f} %)"
    times_above = track.above + 1 if above else 0
    times_below = track.below + 1 if below else 0
    load = track.load
    if times_above >= looks:
        load = Load.OVERLOADED
    elif times_below >= looks:
        load = Load.CALM
    return LoadTrack(load, times_above, times_below, track.readings + 1, read_at, excess, worst)
