"""The load of a host by its readings: hysteresis with consecutive readings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.host_load import (
    READING_S,
    UNKNOWN,
    Load,
    LoadTrack,
    PressureThresholds,
    observe,
    observe_usage,
)
from nomad_watchdog.host_pressure import HostPressure, HostUsage, Resource, Stall
from nomad_watchdog.model import Monotonic

LIMITS = {
    Resource.MEMORY: PressureThresholds(40.0, 10.0),
    Resource.IO: PressureThresholds(60.0, 20.0),
}
percents = st.floats(0, 100)
readings = st.lists(st.tuples(percents, percents), max_size=30)


def played(pressures: list[tuple[float, float]], looks: int, every_s: float = 15.0) -> LoadTrack:
    track = UNKNOWN
    for number, (memory, io) in enumerate(pressures):
        pressure = HostPressure(Stall(99, 99), Stall(memory, 0), Stall(io, 0))
        track = observe(track, pressure, Monotonic(every_s * number), LIMITS, looks)
    return track


def high(one: tuple[float, float]) -> bool:
    return one[0] >= 40 or one[1] >= 60


def low(one: tuple[float, float]) -> bool:
    return one[0] <= 10 and one[1] <= 20


@given(readings, st.integers(1, 5))
def test_only_consecutive_readings_change_the_load(
    pressures: list[tuple[float, float]], looks: int
) -> None:
    """After any readings the host is overloaded if the last run of `looks` readings on one side was above, calm if it
    was below, and unknown if there was none. Resources without thresholds do not count."""
    wanted = Load.UNKNOWN
    for end in range(looks, len(pressures) + 1):
        run = pressures[end - looks : end]
        if all(map(high, run)):
            wanted = Load.OVERLOADED
        elif all(map(low, run)):
            wanted = Load.CALM
    track = played(pressures, looks)
    assert track.load is wanted
    assert track.readings == len(pressures)
    assert track.is_calm == (wanted is Load.CALM and not high(pressures[-1]))


@given(readings, st.floats(0.1, READING_S - 0.1))
def test_readings_that_overlap_count_once(
    pressures: list[tuple[float, float]], gap_s: float
) -> None:
    """Of readings that are closer together than the kernel's average, one per interval counts."""
    track = played(pressures, 3, gap_s)
    assert track.readings <= 1 + gap_s * len(pressures) / READING_S


def test_a_resource_that_was_not_read_makes_the_load_unknown() -> None:
    """A reading without a resource that has thresholds says nothing about the host, and ends a run."""
    overloaded = played([(90, 0)] * 3, 3)
    assert overloaded.load is Load.OVERLOADED
    blind = HostPressure(memory=Stall(90, 90))
    track = observe(overloaded, blind, Monotonic(1000.0), LIMITS, 3)
    assert (track.load, track.above, track.readings) == (Load.UNKNOWN, 0, 0)


def test_usage_has_thresholds_of_its_own() -> None:
    """A host by its scheduler's statistics is overloaded and calm by them; without any its load is unknown."""
    limits = {Resource.MEMORY: PressureThresholds(90.0, 70.0)}
    track = UNKNOWN
    for at in (0.0, 30.0):
        track = observe_usage(track, HostUsage(5.0, 95.0), Monotonic(at), limits, 2)
    assert (track.load, track.worst) == (Load.OVERLOADED, "memory usage 95 % (high: 90 %)")
    unknown = observe_usage(track, HostUsage(5.0, None), Monotonic(60.0), limits, 2)
    assert unknown.load is Load.UNKNOWN
    assert observe_usage(track, HostUsage(5.0, 5.0), Monotonic(60.0), {}, 1).load is Load.UNKNOWN
    calm = observe_usage(UNKNOWN, HostUsage(99.0, 70.0), Monotonic(0.0), limits, 1)
    assert calm.is_calm


def test_the_worst_resource_is_named() -> None:
    """The pressure that exceeds its threshold most is named, relative to the threshold."""
    track = played([(41, 90)], 1)
    assert track.worst == "io pressure 90 % (high: 60 %)"
    assert track.excess == 1.5
    assert track.after_move().above == 0
    assert track.after_move().load is Load.OVERLOADED
