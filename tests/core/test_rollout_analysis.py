"""What a query says of a version on trial."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.rollout_analysis import Analysis, Measured, QueryValue, after, why_bad
from nomad_watchdog.core.rollout_progress import Observed, RolloutProgress, advance
from nomad_watchdog.core.rollout_progress import why_bad as why_version_is_bad
from nomad_watchdog.core.rollout_steps import RolloutStep, Strategy, complete
from nomad_watchdog.model import Monotonic, WallTime

RULES = Analysis("http://p", "q", minimum=1.0, maximum=2.0, failures=3)
DEADLINE_S = 60.0
UNREADABLE = st.sampled_from([None, float("nan"), float("inf")])
VALUES = st.one_of(UNREADABLE, st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0]))
READINGS = st.lists(st.tuples(VALUES, st.floats(1.0, 50.0)), max_size=12)


def is_inside(value: float | None) -> bool:
    return value is not None and 1.0 <= value <= 2.0


def is_outside(value: float | None) -> bool:
    return value in (0.0, 3.0)


@given(READINGS)
def test_only_values_in_a_row_or_a_long_silence_make_a_version_bad(
    readings: list[tuple[float | None, float]],
) -> None:
    """Bad: as many values outside of the limits since the last one inside as `failures`, or no value for longer than the
    deadline. What can't be read is never a failure, and never lets a step pass."""
    seen, now, outside, unread_since = Measured(), 0.0, 0, None
    for value, later_s in readings:
        now += later_s
        seen = after(RULES, seen, QueryValue(value, "no answer"), Monotonic(now))
        outside = 0 if is_inside(value) else outside + is_outside(value)
        readable = is_inside(value) or is_outside(value)
        unread_since = None if readable else unread_since if unread_since is not None else now
        silent = unread_since is not None and now - unread_since > DEADLINE_S
        assert seen.passed is is_inside(value)
        bad = why_bad(RULES, seen, Monotonic(now), DEADLINE_S)
        assert bool(bad) is (outside >= 3 or silent)
        assert ("can't be read" in seen.words) is not readable


def test_the_words_name_value_and_limit() -> None:
    """Someone who reads them knows which limit was exceeded, and how often."""
    seen = after(RULES, Measured(), QueryValue(0.25), Monotonic(1.0))
    assert seen.words == "the query returns 0.25, less than 1 (min)"
    seen = after(RULES, seen, QueryValue(3.0), Monotonic(2.0))
    assert seen.words == "the query returns 3, more than 2 (max), 2 times in a row"
    seen = after(RULES, seen, QueryValue(None, "HTTP 503"), Monotonic(3.0))
    assert why_bad(RULES, seen, Monotonic(64.0), DEADLINE_S) == (
        "the query can't be read: HTTP 503, for 60 s (rollout.progress_deadline)"
    )


@given(st.sampled_from([0.0, 5.0]), st.booleans(), st.booleans(), st.booleans())
def test_a_step_waits_for_the_query(soak_s: float, waits: bool, bad: bool, promoted: bool) -> None:
    """It passes when its soak is over and the query does not hold it back, or when an operator promotes it; a bad query
    ends the roll-out in any case."""
    strategy = Strategy(complete([RolloutStep(count=1, soak_s=soak_s)]))
    progress = RolloutProgress("h", "2", WallTime(0.0), promoted=promoted)
    seen = Observed(1, 1, 1, query_waits="not read" if waits else "")
    for _ in range(8):
        before = progress
        progress = advance(strategy, progress, seen, (), 1.0)
        if progress.step:
            break
        assert progress.soaked_s <= soak_s
    assert bool(progress.step) is (promoted or not waits)
    assert progress.step or progress == replace(before, soaked_s=soak_s)
    assert bool(why_version_is_bad(strategy, replace(seen, query_bad="3" if bad else ""))) is bad
