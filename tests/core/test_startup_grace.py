"""The start-up grace: measured, bounded, and not determined by a few outliers."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core.startup_grace import BINS, ENOUGH, MAX_CLASSES, GraceLimits, StartTimes
from nomad_watchdog.model import Monotonic

LIMITS = GraceLimits(fallback_s=60.0, least_s=15.0, most_s=900.0)
DAY_S = 86_400.0

times = st.floats(0.0, 1e9, allow_nan=False)
samples = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), times, st.floats(0, 1e5)), max_size=80
)


def filled(
    p50: float, p99: float, count: int, *, name: str = "default", at: float = 0.0
) -> StartTimes:
    found = StartTimes(LIMITS)
    fill(found, p50, p99, count, name=name, at=at)
    return found


def fill(
    found: StartTimes, p50: float, p99: float, count: int, *, name: str = "default", at: float = 0.0
) -> None:
    chance = random.Random(7)
    for number in range(count):
        took = p50 * math.exp(chance.gauss(0.0, math.log(p99 / p50) / 2.3263))
        found.add(name, took, Monotonic(at + number))


@settings(max_examples=200, deadline=None)
@given(samples)
def test_the_grace_stays_within_its_limits(given_samples: list) -> None:
    """Whatever was measured, the grace is the setting until there are samples, and within the limits after that."""
    found = StartTimes(LIMITS)
    count = 0
    for name, took, at in given_samples:
        found.add(name, took, Monotonic(at))
        count += 1
        grace = found.grace(name)
        assert LIMITS.least_s <= grace.seconds <= LIMITS.most_s
        assert (grace.source == "setting") == (grace.samples < ENOUGH)
        if count < ENOUGH:
            assert grace.seconds == LIMITS.fallback_s


@pytest.mark.parametrize("count", [100, 1_000, 20_000])
def test_lognormal_starts_end_within_the_grace(count: int) -> None:
    """With a p50 of 6 s and a p99 of 60 s, fewer than one start in a thousand takes longer than the grace, however few
    were measured; and the grace is at most ten times the p99."""
    grace_s = filled(6.0, 60.0, count).grace("default").seconds
    spread = math.log(10.0) / 2.3263
    late = 0.5 * math.erfc(math.log(grace_s / 6.0) / spread / math.sqrt(2))

    assert late < 0.001
    assert grace_s < 600.0


def test_two_kinds_of_start_are_both_covered() -> None:
    """Where one start in twenty takes a hundred times as long, the grace covers those too."""
    found = StartTimes(LIMITS)
    for number in range(2_000):
        found.add("default", 200.0 if number % 20 == 0 else 2.0, Monotonic(number))

    assert found.grace("default").seconds >= 200.0


def test_a_slow_site_is_forgotten() -> None:
    """A thousand starts of 300 s increase the grace, but no longer after a few days of quick ones."""
    found = filled(300.0, 400.0, 1_000)
    assert found.grace("default").seconds > 300.0

    for day in range(1, 7):
        fill(found, 2.0, 6.0, 500, at=day * DAY_S)

    assert found.grace("default").seconds < 60.0


def test_many_starts_push_old_ones_out_without_waiting() -> None:
    """After a storm of quick starts earlier slow ones no longer count, on the same day."""
    found = filled(300.0, 400.0, 1_000)

    fill(found, 2.0, 6.0, 60_000, at=1.0)

    assert found.grace("default").seconds < 60.0


def test_a_class_borrows_from_the_fleet_until_it_has_samples() -> None:
    """A class that never started uses the fleet's grace, one that did uses its own, and none uses another class's."""
    found = filled(2.0, 8.0, 2_000, name="quick")
    fill(found, 60.0, 120.0, 2_000, name="slow")

    assert found.grace("new").source == "fleet"
    assert found.grace("quick").source == "class"
    assert found.grace("quick").seconds < 60.0 < found.grace("slow").seconds


def test_memory_is_bounded_by_classes() -> None:
    """More class names than are kept change only the fleet's measurements."""
    found = StartTimes(LIMITS)
    for number in range(10 * MAX_CLASSES):
        for _ in range(2):
            found.add(f"class-{number}", 5.0, Monotonic(number))
            found.grace(f"class-{number}")

    assert len(found._classes) == MAX_CLASSES
    assert len(found._known) <= 2 * MAX_CLASSES
    assert all(len(one.bins) == BINS for one in found._classes.values())
    assert found.grace("class-639").source == "fleet"


@pytest.mark.parametrize("took", [-1.0, math.nan, math.inf])
def test_a_time_that_is_none_is_refused(took: float) -> None:
    """A negative, infinite or unknown time is the caller's error and is not measured."""
    with pytest.raises(ValueError, match="a start took"):
        StartTimes(LIMITS).add("default", took, Monotonic(0.0))
