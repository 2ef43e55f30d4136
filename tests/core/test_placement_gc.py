"""A dead placement stays listed until no late request for its epoch can arrive (S2)."""

from __future__ import annotations

from nomad_watchdog.core.placement_gc import MOST, REST_S, PlacementGc
from nomad_watchdog.model import Monotonic, PlacementState
from tests.core.world import placement, record

DEAD = PlacementState.DEAD
HERE = record("cam", epoch=3)
OLD = placement("cam", 2, DEAD)


def test_s2_a_dead_placement_rests_before_it_is_forgotten() -> None:
    """A placement that is over is due REST_S after it was first seen dead, and not a second earlier."""
    yard = PlacementGc()
    seen = {OLD.slug: (OLD,)}
    assert yard.due({HERE.slug: HERE}, seen, Monotonic(10.0)) == []
    assert yard.due({HERE.slug: HERE}, seen, Monotonic(9.0 + REST_S)) == []
    assert yard.due({HERE.slug: HERE}, seen, Monotonic(10.0 + REST_S)) == [OLD]


def test_what_lives_or_is_current_is_never_due() -> None:
    """Neither a live placement nor a dead one at the registry's epoch is ever due."""
    yard = PlacementGc()
    seen = {OLD.slug: (placement("cam", 1), placement("cam", 3, DEAD))}
    for now in (0.0, REST_S, 10 * REST_S):
        assert yard.due({HERE.slug: HERE}, seen, Monotonic(now)) == []


def test_the_departed_and_the_unknown_are_due_in_small_numbers() -> None:
    """For a device that left, or is not registered, all dead placements are due, MOST at a time."""
    yard = PlacementGc()
    gone = record("gone", epoch=1, present=False)
    seen = {gone.slug: (placement("gone", 1, DEAD),)}
    seen |= {p.slug: (p,) for p in (placement(f"stray {i}", 1, DEAD) for i in range(2 * MOST))}
    yard.due({gone.slug: gone}, seen, Monotonic(0.0))
    due = yard.due({gone.slug: gone}, seen, Monotonic(REST_S))
    assert len(due) == MOST
    assert due[0].slug == gone.slug


def test_one_that_came_back_rests_again() -> None:
    """A placement that was seen alive in between starts its rest period again."""
    yard = PlacementGc()
    yard.due({HERE.slug: HERE}, {OLD.slug: (OLD,)}, Monotonic(0.0))
    yard.due({HERE.slug: HERE}, {OLD.slug: (placement("cam", 2),)}, Monotonic(REST_S / 2))
    assert yard.due({HERE.slug: HERE}, {OLD.slug: (OLD,)}, Monotonic(REST_S)) == []
