"""A pool follows its metric within its bounds, steadily, and never follows a missing metric."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nomad_watchdog.core.pool_scaling import (
    Measure,
    ScalingDecision,
    ScalingReason,
    ScalingRules,
    ScalingState,
    ScalingVerb,
    advise,
    changed,
    decide,
)
from nomad_watchdog.model import Monotonic


@st.composite
def rules_of(draw: st.DrawFn) -> ScalingRules:
    measure = draw(st.sampled_from(Measure))
    least = draw(st.integers(0 if measure is Measure.ALL else 1, 20))
    return ScalingRules(
        minimum=least,
        maximum=draw(st.integers(max(1, least), 40)),
        target=draw(st.floats(0.01, 1e6)),
        measure=measure,
        tolerance=draw(st.floats(0, 1)),
        cooldown_up_s=draw(st.floats(0, 300)),
        cooldown_down_s=draw(st.floats(0, 300)),
        settle_s=draw(st.floats(0, 300)),
        step_up=draw(st.integers(1, 50)),
        step_down=draw(st.integers(1, 50)),
    )


values = st.floats(0, 1e9)
anything = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
looks = st.lists(st.tuples(st.floats(0, 200), anything), min_size=1, max_size=40)

QUEUE = ScalingRules(
    minimum=1,
    maximum=10,
    target=10.0,
    measure=Measure.ALL,
    tolerance=0.1,
    cooldown_up_s=30,
    cooldown_down_s=60,
    settle_s=100,
    step_up=4,
    step_down=2,
)


def play(
    rules: ScalingRules, count: int, steps: list[tuple[float, float | None]]
) -> list[tuple[float, int, ScalingDecision]]:
    """Simulate an obedient pool: (time, previous count, decision)."""
    memory, now, told = ScalingState(), 0.0, []
    for gap, value in steps:
        now += gap
        found = decide(rules, count, value, memory, Monotonic(now))
        told.append((now, count, found))
        memory = found.memory
        if found.acts:
            count = found.count
            memory = changed(memory, count, Monotonic(now))
    return told


@given(rules_of(), st.integers(0, 60), anything)
def test_whatever_is_seen_the_answer_is_within_bounds(
    rules: ScalingRules, count: int, value: float | None
) -> None:
    """A single reading leads to a number within min and max, even from outside of them."""
    found = decide(rules, count, value, ScalingState(), Monotonic(0.0))

    assert rules.minimum <= found.count <= rules.maximum
    assert rules.minimum <= found.advised <= rules.maximum


@given(rules_of(), st.integers(0, 60), looks)
def test_no_history_leads_out_of_bounds_or_takes_too_large_a_step(
    rules: ScalingRules, count: int, steps: list[tuple[float, float | None]]
) -> None:
    """Within the bounds no change is larger than its step, whatever happened before."""
    for _, before, found in play(rules, count, steps):
        assert rules.minimum <= found.count <= rules.maximum
        if found.why is ScalingReason.METRIC:
            assert -rules.step_down <= found.count - before <= rules.step_up


@given(rules_of(), st.integers(0, 60), looks)
def test_two_changes_by_the_metric_are_a_cool_down_apart(
    rules: ScalingRules, count: int, steps: list[tuple[float, float | None]]
) -> None:
    """After any change, growing waits for cooldown_up_s and shrinking for cooldown_down_s."""
    last = -math.inf
    for now, _, found in play(rules, count, steps):
        if found.why is ScalingReason.METRIC and found.acts:
            least = rules.cooldown_up_s if found.verb is ScalingVerb.UP else rules.cooldown_down_s
            assert now - last >= least - 1e-6
        if found.acts:
            last = now


@example(replace(QUEUE, settle_s=0.0), 5, [(0.0, 0.0)])
@given(rules_of(), st.integers(0, 60), looks)
def test_a_pool_shrinks_only_below_what_nothing_asked_for_lately(
    rules: ScalingRules, count: int, steps: list[tuple[float, float | None]]
) -> None:
    """No worker is removed that the current reading, or one within settle_s, advised to keep."""
    told = play(rules, count, steps)
    for number, (now, before, found) in enumerate(told):
        if found.why is ScalingReason.METRIC and found.verb is ScalingVerb.DOWN:
            lately = [
                one.advised
                for at, _, one in told[:number]
                if now - at < rules.settle_s
                and one.why not in (ScalingReason.NO_METRIC, ScalingReason.BOUNDS)
            ]
            assert found.count >= min(before, max([found.advised, *lately]))


@given(
    rules_of().flatmap(
        lambda rules: st.tuples(st.just(rules), st.integers(rules.minimum, rules.maximum))
    ),
    st.one_of(st.none(), st.just(math.nan), st.just(math.inf), st.floats(max_value=-1e-9)),
)
def test_a_metric_that_is_missing_or_no_number_changes_nothing(
    inside: tuple[ScalingRules, int], value: float | None
) -> None:
    """Within the bounds the count does not change on None, NaN, infinity or a negative number."""
    rules, count = inside
    found = decide(rules, count, value, ScalingState(), Monotonic(0.0))

    assert (found.count, found.verb, found.why) == (
        count,
        ScalingVerb.KEEP,
        ScalingReason.NO_METRIC,
    )


@given(rules_of(), st.integers(0, 60), looks)
def test_what_is_kept_of_a_pool_is_bounded(
    rules: ScalingRules, count: int, steps: list[tuple[float, float | None]]
) -> None:
    """However often the metric is read, at most one piece of advice per number of workers is kept (S9)."""
    for _, _, found in play(rules, count, steps):
        numbers = [number for _, number in found.memory.advised]
        assert numbers == sorted(set(numbers), reverse=True)


@given(rules_of(), st.integers(0, 60), looks)
def test_a_dry_run_decides_the_same_and_does_nothing(
    rules: ScalingRules, count: int, steps: list[tuple[float, float | None]]
) -> None:
    """The first decision is identical to a real one, and no decision takes effect."""
    dry = play(replace(rules, dry_run=True), count, steps)
    (_, _, real), *_ = play(rules, count, steps)

    assert replace(dry[0][2], dry_run=False) == real
    assert not any(found.acts for _, _, found in dry)


@given(rules_of(), st.integers(0, 40), values, values)
def test_more_of_the_metric_never_advises_fewer_workers(
    rules: ScalingRules, count: int, one: float, other: float
) -> None:
    """The advice never decreases as the metric grows."""
    low, high = sorted((one, other))

    assert advise(rules, count, low) <= advise(rules, count, high)


@given(st.integers(1, 40), st.floats(-0.999, 0.999), st.sampled_from(Measure))
@example(3, 0.0, Measure.ALL)
def test_within_tolerance_nothing_is_advised(count: int, off: float, measure: Measure) -> None:
    """A metric that differs from its target by less than the tolerance does not change the pool."""
    rules = replace(QUEUE, maximum=40, measure=measure, target=0.1, tolerance=0.2)
    whole = count if measure is Measure.ALL else 1

    assert advise(rules, count, 0.1 * whole * (1 + 0.2 * off)) == count


@given(rules_of(), st.integers(0, 40), values)
def test_a_metric_that_stays_ends_in_a_count_that_stays(
    rules: ScalingRules, count: int, load: float
) -> None:
    """A constant queue depth leads to one number of workers, which then stays."""
    rules = replace(rules, measure=Measure.ALL)
    steps: list[tuple[float, float | None]] = [(301.0, load)] * 120
    told = play(rules, count, steps)

    assert {found.verb for _, _, found in told[-10:]} == {ScalingVerb.KEEP}
    last = told[-1][1]
    assert advise(rules, last, load) == last


def test_a_deep_queue_grows_the_pool_in_steps_and_an_empty_one_shrinks_it_late() -> None:
    """With 80 waiting and a target of 10 per worker the pool grows from 1 to 5 and 8 workers, a cool-down apart; with
    an empty queue it shrinks by two at a time once nothing was needed during settle_s."""
    steps: list[tuple[float, float | None]] = [(0, 80), (29, 80), (1, 80), (10, 0)]
    told = play(QUEUE, 1, [*steps, *[(10.0, 0.0)] * 40])
    counts = {now: found.count for now, _, found in told if found.acts}

    assert counts == {0: 5, 30: 8, 130: 6, 190: 4, 250: 2, 310: 1}
    assert told[1][2].why is ScalingReason.COOL_DOWN
    assert told[3][2].why is ScalingReason.SETTLING


def test_a_pool_without_a_worker_gets_the_first_one_for_anything_that_waits() -> None:
    """From 0, a single message leads to one worker, although it is far below the target of one."""
    rules = replace(QUEUE, minimum=0)

    assert advise(rules, 0, 1.0) == 1
    assert advise(rules, 0, 0.0) == 0


def test_who_takes_over_takes_no_worker_before_it_has_watched_for_a_while() -> None:
    """With an empty memory, as after a failover, an idle pool keeps its size for settle_s."""
    told = play(QUEUE, 8, [(0.0, 0.0), (50.0, 0.0), (49.0, 0.0), (1.0, 0.0)])

    assert [found.count for _, _, found in told] == [8, 8, 8, 6]


def test_a_change_by_hand_starts_the_cool_down() -> None:
    """After a manual scaling the metric counts again only after the cool-down."""
    first = decide(QUEUE, 5, 50.0, ScalingState(), Monotonic(0.0))
    by_hand = decide(QUEUE, 2, 50.0, first.memory, Monotonic(100.0))
    later = decide(QUEUE, 2, 50.0, by_hand.memory, Monotonic(130.0))

    assert by_hand.why is ScalingReason.COOL_DOWN
    assert (later.why, later.count) == (ScalingReason.METRIC, 5)


def test_a_clock_that_runs_backwards_ends_no_cool_down() -> None:
    """A time before the last change counts as no time passed."""
    memory = changed(ScalingState(), 1, Monotonic(100.0))

    assert decide(QUEUE, 1, 90.0, memory, Monotonic(10.0)).why is ScalingReason.COOL_DOWN


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"minimum": 11}, "max"),
        ({"minimum": 0, "maximum": 0}, "max"),
        ({"minimum": 0, "measure": Measure.WORKER}, "average"),
        ({"target": 0.0}, "target"),
        ({"target": math.nan}, "target"),
        ({"step_down": 0}, "step"),
    ],
)
def test_rules_that_make_no_sense_are_refused(change: dict[str, object], text: str) -> None:
    """Reversed bounds, no target, no step, and an average over 0 workers are rejected."""
    with pytest.raises(ValueError, match=text):
        replace(QUEUE, **change)  # type: ignore[arg-type]
