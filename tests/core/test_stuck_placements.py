"""Placements that make no progress: which are given up, when, and how many at a time."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core.actions import ActionKind, Move
from nomad_watchdog.core.planner import Plan, plan
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.core.stuck_placements import BACKOFF_S, MAX_DOUBLINGS, WAITING, StuckPlacements
from nomad_watchdog.model import Limits, Monotonic, Placement, PlacementState, WallTime
from tests.core.world import GOALS, OLD_SPEC, World, placement, record

MAX_S = 180.0
NAMES = [f"device-{n}" for n in range(8)]
STATES = st.sampled_from(list(PlacementState))
waiting_states = st.sampled_from(sorted(WAITING))


def seen(waits: StuckPlacements, at: float, *found: Placement) -> None:
    waits.seen({one.slug: (one,) for one in found}, None, Monotonic(at))


def stalled(waits: StuckPlacements, one: Placement, at: float) -> bool:
    return waits.is_stalled(one, MAX_S, Monotonic(at))


def passing(waits: StuckPlacements, found: list[Placement], at: float, **more: object) -> Plan:
    """The plan at a time, for devices whose records all have the placement's epoch."""
    world = World([record(str(one.device_id), epoch=one.epoch) for one in found], found)
    now = Monotonic(at)
    return plan(
        world.records,
        world.placements,
        replace(
            GOALS,
            stalled=lambda one: "no progress" if waits.is_stalled(one, MAX_S, now) else "",
        ),
        Limits(),
        **more,  # type: ignore[arg-type]
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.1, 400.0), STATES, st.integers(0, 2), st.booleans()), max_size=12
    )
)
def test_only_a_wait_without_progress_is_given_up(
    steps: list[tuple[float, PlacementState, int, bool]],
) -> None:
    """Whatever a scheduler lists, a placement is given up exactly when it has waited unchanged for longer than
    its limit, and is not in its scheduler's queue."""
    waits, now, since = StuckPlacements(), 0.0, 0.0
    before: tuple[PlacementState, int] | None = None
    for wait_s, state, restarts, queued in steps:
        now += wait_s
        one = replace(placement("a", 1, state), restarts=restarts, queued=queued)
        if (state, restarts) != before:
            since, before = now, (state, restarts)
        seen(waits, now, one)
        for later in (0.0, MAX_S + 1.0, MAX_S + BACKOFF_S + 1.0):
            most_s = MAX_S + (BACKOFF_S if state is PlacementState.RESTARTING else 0.0)
            expected = state in WAITING and not queued and now + later - since > most_s
            assert stalled(waits, one, now + later) == expected
            assert not waits.is_stalled(one, 0.0, Monotonic(now + later))


def test_a_new_allocation_is_progress() -> None:
    """A new allocation or pod for the same placement gets the full time again."""
    waits, one = StuckPlacements(), placement("a", 1, PlacementState.STARTING)
    seen(waits, 0.0, one)
    moved = replace(one, waits_since=WallTime(5.0))
    seen(waits, 170.0, moved)
    assert not stalled(waits, moved, 349.0)
    assert stalled(waits, moved, 351.0)


def test_a_partial_listing_leaves_the_others_as_they_are() -> None:
    """A listing of some devices does not affect the waits of others."""
    waits, a, b = (
        StuckPlacements(),
        placement("a", 1, PlacementState.STARTING),
        placement("b", 1, PlacementState.STARTING),
    )
    seen(waits, 0.0, a, b)
    waits.seen({}, {b.slug}, Monotonic(100.0))
    waits.seen({b.slug: (b,)}, {b.slug}, Monotonic(101.0))
    assert stalled(waits, a, 200.0)
    assert not stalled(waits, b, 200.0)


def test_the_limit_doubles_with_each_that_was_given_up() -> None:
    """A start that takes long gets more time with each attempt, and a running one resets the limit."""
    waits, now = StuckPlacements(), 0.0
    limits = []
    for epoch in range(1, MAX_DOUBLINGS + 3):
        one = placement("a", epoch, PlacementState.STARTING)
        seen(waits, now, one)
        limits.append(waits.limit_s(one, MAX_S))
        assert stalled(waits, one, now + limits[-1] + 1)
        now += limits[-1] + 1
        waits.given_up(one.slug, Monotonic(now))
        seen(waits, now)
    assert limits == [MAX_S, 2 * MAX_S, 4 * MAX_S, 8 * MAX_S, 8 * MAX_S]
    seen(waits, now, placement("a", 9))
    assert waits.limit_s(placement("a", 9, PlacementState.STARTING), MAX_S) == MAX_S


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(STATES, st.booleans(), st.booleans()), max_size=8), st.integers(0, 8))
def test_only_what_makes_no_progress_is_replaced_and_no_more_than_there_is_room_for(
    found: list[tuple[PlacementState, bool, bool]], room: int
) -> None:
    """Of placements with the current spec a plan replaces only those that wait, even with a full window, and at most
    `stalled_room`. Nothing is started in the same pass (S3)."""
    some = [
        replace(placement(name, 1, state), queued=queued)
        for name, (state, queued, _) in zip(NAMES, found, strict=False)
    ]
    alive = {one.slug for one, (_, _, ready) in zip(some, found, strict=False) if ready}
    waits = StuckPlacements()
    seen(waits, 0.0, *some)
    full = Readiness(unready=100, ready=lambda slug: slug in alive)
    made = passing(waits, some, 1_000.0, stalled_room=room, readiness=full)
    replaced = [a for a in made.actions if a.kind is ActionKind.REPLACE]
    due = [one for one in some if one.state in WAITING and not one.queued and one.slug not in alive]
    assert len(replaced) == min(room, len(due))
    assert {a.slug for a in replaced} <= {one.slug for one in due}
    assert all(a.move is Move.STALLED and a.reason == "no progress" for a in replaced)
    live = {one.slug for one in some if one.state is not PlacementState.DEAD}
    assert not live & {a.slug for a in made.actions if a.kind is ActionKind.START}


def test_an_agent_that_is_ready_is_given_up_only_with_room_in_the_window() -> None:
    """If the device is watched by an agent that its scheduler does not list, the next epoch leaves it without an agent
    for a moment: limited to as many at a time as in a roll-out."""
    some = [placement(name, 1, PlacementState.STARTING) for name in NAMES]
    waits = StuckPlacements()
    seen(waits, 0.0, *some)
    made = passing(
        waits,
        some,
        1_000.0,
        stalled_room=100,
        readiness=Readiness(unready=2, ready=lambda _slug: True),
    )
    assert len(made.actions) == Limits().replace_at_once - 2


def test_the_fleet_gives_up_so_many_in_a_period() -> None:
    """Recently given up placements take room, whatever became of them, and no longer than the period."""
    waits = StuckPlacements()
    for n in range(4):
        waits.given_up(placement(f"d{n}", 1).slug, Monotonic(n))
    assert waits.room(5, 180.0, Monotonic(10.0)) == 1
    assert waits.room(3, 180.0, Monotonic(10.0)) == 0
    assert waits.room(5, 180.0, Monotonic(181.5)) == 3


def test_a_roll_out_that_waits_for_its_turn_does_not_keep_what_is_stalled() -> None:
    """A placement of an old spec that makes no progress is given up for that, not as part of the roll-out."""
    one = placement("a", 1, PlacementState.STARTING, spec=OLD_SPEC)
    waits = StuckPlacements()
    seen(waits, 0.0, one)
    full = Readiness(unready=100, halted=frozenset({"default"}))
    assert not passing(waits, [one], 10.0, stalled_room=5, readiness=full).actions
    (action,) = passing(waits, [one], 1_000.0, stalled_room=5, readiness=full).actions
    assert action.move is Move.STALLED
