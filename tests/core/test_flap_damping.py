"""Flapping starts, is reported, and ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.flap_damping import FlapDamper, changed, is_flapping, is_forgotten
from nomad_watchdog.model import Monotonic, PresenceRules

rules_of = st.builds(
    PresenceRules,
    flap_changes=st.integers(1, 20),
    flap_half_life_s=st.floats(1, 1000),
)


def after(rules: PresenceRules, gaps: list[float]) -> tuple[FlapDamper | None, float]:
    flap, now = None, 0.0
    for gap in gaps:
        now += gap
        flap = changed(flap, rules, Monotonic(now))
    return flap, now


@given(rules_of, st.lists(st.floats(0, 500), min_size=1, max_size=200))
def test_flapping_ends_within_two_half_lives_of_the_last_change(
    rules: PresenceRules, gaps: list[float]
) -> None:
    """However many changes there were, flapping ends in bounded time and its state is not kept for long."""
    flap, now = after(rules, gaps)

    assert flap is not None
    assert not is_flapping(flap, rules, Monotonic(now + 2.001 * rules.flap_half_life_s))
    assert is_forgotten(flap, rules, Monotonic(now + 12 * rules.flap_half_life_s))


@given(rules_of)
def test_so_many_changes_at_once_are_flapping_and_one_less_is_not(rules: PresenceRules) -> None:
    """`flap_changes` changes at once are flapping, and one less is not."""
    k = rules.flap_changes
    flap, now = after(rules, [0.0] * k)
    assert flap is not None
    assert is_flapping(flap, rules, Monotonic(now))
    if k > 1:
        fewer, now = after(rules, [0.0] * (k - 1))
        assert fewer is not None
        assert not is_flapping(fewer, rules, Monotonic(now))


@given(rules_of.filter(lambda rules: rules.flap_changes > 2), st.integers(1, 100))
def test_slow_changes_never_flap(rules: PresenceRules, count: int) -> None:
    """One change per half-life keeps the penalty at 2 or less."""
    flap, now = after(rules, [rules.flap_half_life_s] * count)

    assert flap is not None
    assert not is_flapping(flap, rules, Monotonic(now))


def test_zero_changes_switch_it_off() -> None:
    """With detection disabled nothing is remembered."""
    assert after(PresenceRules(flap_changes=0), [0.0] * 50)[0] is None
