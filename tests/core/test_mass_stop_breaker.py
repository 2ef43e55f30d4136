"""The breaker's memory (S7): which confirmation allows which stops."""

from __future__ import annotations

from nomad_watchdog.core.holds import hold_id
from nomad_watchdog.core.mass_stop_breaker import MassStopBreaker
from nomad_watchdog.core.planner import Plan, Stop
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch

A: Stop = (Slug("a-1"), Epoch(1), "ref-a")
B: Stop = (Slug("b-1"), Epoch(1), "ref-b")


def test_an_operators_word_during_the_second_read_is_not_lost() -> None:
    """A second read does not confirm strays; an operator's approval given meanwhile does."""
    breaker = MassStopBreaker()
    breaker.update(Plan((), held=frozenset({A, B}), hold_reason="two of two"))
    held = breaker.held
    assert breaker.confirm() == 2
    breaker.read_again(held, registered={A[0]})
    assert breaker.confirmed == {A, B}


def test_a_second_read_confirms_only_what_is_registered() -> None:
    """A stop of an unregistered device waits for an operator, and the command to type is stated."""
    breaker = MassStopBreaker()
    breaker.update(Plan((), held=frozenset({A, B}), hold_reason="two of two"))
    assert breaker.wants_second_read
    breaker.read_again(breaker.held, registered={A[0]})
    assert breaker.confirmed == {A}
    assert not breaker.wants_second_read
    assert breaker.held_id in breaker.next_step


def test_the_id_names_exactly_these_stops() -> None:
    """Order does not matter, another epoch or placement does, and an empty set has no ID."""
    assert hold_id(frozenset({A, B})) == hold_id(frozenset({B, A}))
    assert hold_id(frozenset({A})) != hold_id(frozenset({A, B}))
    assert hold_id(frozenset({A})) != hold_id(frozenset({(A[0], Epoch(2), A[2])}))
    assert hold_id(frozenset()) == MassStopBreaker().next_step == ""


def test_a_stray_that_is_registered_meanwhile_is_read_once_more() -> None:
    """If lost records are registered again, a second read is enough, without an operator."""
    breaker = MassStopBreaker()
    plan = Plan((), held=frozenset({A, B}), hold_reason="two of two")
    breaker.update(plan)
    breaker.read_again(breaker.held, registered=())
    breaker.update(plan)
    assert not breaker.wants_second_read
    breaker.update(plan, {A[0]})
    assert breaker.wants_second_read
    breaker.read_again(breaker.held, registered={A[0]})
    assert breaker.confirmed == {A}
