"""All reasons to replace an agent share one window, and the most urgent ones get room first."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core import planner
from nomad_watchdog.core.actions import ActionKind, Move
from nomad_watchdog.core.migration import BackendAssignment, Migration
from nomad_watchdog.core.moves import MoveRequest, combined
from nomad_watchdog.core.planner import plan
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import Limits, WallTime
from tests.core.world import GOALS, OLD_SPEC, SPEC, World, placement, record

NAMES = tuple(f"d{n}" for n in range(12))
MOVES = (Move.DRAIN, Move.RELIEF, Move.REBALANCE)
SLUGS = [slug_of(DeviceId(name)) for name in NAMES]


@st.composite
def fleets(draw: st.DrawFn) -> tuple[World, dict[Slug, MoveRequest]]:
    """Running agents with an old or the current spec, some of which are to leave their placements."""
    found = [
        placement(name, 1, spec=OLD_SPEC if draw(st.booleans()) else SPEC)
        for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    ]
    requested = {
        one.slug: MoveRequest(move, draw(st.sampled_from([one.ref, "gone"])), move.name)
        for one in found
        if (move := draw(st.sampled_from([None, *MOVES])))
    }
    return World([record(str(one.device_id), epoch=1) for one in found], found), requested


@settings(max_examples=200, deadline=None)
@given(
    fleets(), st.integers(1, 6), st.integers(0, 6), st.frozensets(st.sampled_from(SLUGS)), st.data()
)
def test_one_window_holds_and_the_order_of_reasons_is_kept(
    fleet: tuple[World, dict[Slug, MoveRequest]],
    most: int,
    unready: int,
    unwell: frozenset[Slug],
    data: st.DataObject,
) -> None:
    """Never more replacements than the window has room; whatever waits is not more urgent than what begins, except
    for a replacement that has begun already."""
    world, requested = fleet
    in_work = data.draw(st.frozensets(st.sampled_from(sorted(world.records)), max_size=1))
    made = plan(
        world.records,
        world.placements,
        replace(GOALS, requested=requested),
        Limits(replace_at_once=most, replace_fraction=0.0),
        readiness=Readiness(unready, in_work=in_work.__contains__, unwell=unwell.__contains__),
    )

    def urgency(slug: Slug, move: Move) -> tuple[bool, Move, bool, Slug]:
        return slug not in in_work, move, slug in unwell, slug

    begun = [urgency(a.slug, a.move) for a in made.actions]
    waiting = [urgency(a.slug, a.move) for a in made.waiting]
    assert len(begun) == min(len(begun) + len(waiting), max(0, most - unready))
    assert not begun or not waiting or max(begun) < min(waiting)


def test_a_version_that_was_given_up_does_not_wait_for_a_migration() -> None:
    """An agent of it that is to move to another scheduler, too, is taken back first."""
    device = record("d0", epoch=1)
    move = Migration("m", "a", "b", WallTime(0.0), "test")
    homes = BackendAssignment("a", "a", (move,), frozenset("ab"))
    bad = planner.decide(
        device,
        (placement("d0", 1, spec=OLD_SPEC),),
        replace(GOALS, homes=homes, given_up=frozenset({OLD_SPEC})),
    )
    old = planner.decide(device, (placement("d0", 1, spec=OLD_SPEC),), replace(GOALS, homes=homes))
    assert [(one.move, one.home) for one in (*bad, *old)] == [
        (Move.ROLLBACK, ""),
        (Move.MIGRATION, "b"),
    ]


def test_a_replacement_in_progress_takes_room_although_it_is_not_wanted_any_more() -> None:
    """After an abort, the replacement that had begun for the roll-out still takes a ready agent away."""
    found = [placement("d0", 1), placement("d1", 1, spec=OLD_SPEC)]
    world = World([record("d0", epoch=1), record("d1", epoch=1)], found)
    (began, waits) = (found[0].slug, found[1].slug)
    for leaving, begun in ((frozenset(), [waits]), (frozenset({began}), []), ({waits}, [waits])):
        made = plan(
            world.records,
            world.placements,
            GOALS,
            Limits(replace_at_once=1),
            readiness=Readiness(leaving=frozenset(leaving)),
        )
        assert [one.slug for one in made.actions] == begun


def test_a_replacement_in_progress_takes_room_although_it_may_not_begin_now() -> None:
    """It is in the hands of the executor, whether its class was halted, or its request has begun to wait, since."""
    for halted, waits_for in ((True, ""), (False, "a place")):
        found = [
            replace(placement("d0", 1, spec=OLD_SPEC), agent_class="other"),
            placement("d1", 1, spec=OLD_SPEC),
        ]
        began, other = found[0].slug, found[1].slug
        records = [record("d0", epoch=1), record("d1", epoch=1)]
        records[0] = replace(records[0], device=replace(records[0].device, agent_class="other"))
        world = World(records, found)
        request = MoveRequest(Move.DRAIN, found[0].ref, "draining", waits_for)
        requested = {} if halted else {began: request}
        halts = frozenset({"other"}) if halted else frozenset()
        hashes = {**GOALS.spec_hashes, "other": SPEC}
        for leaving, begun in ((frozenset({began}), []), (frozenset(), [other])):
            made = plan(
                world.records,
                world.placements,
                replace(GOALS, spec_hashes=hashes, requested=requested),
                Limits(replace_at_once=1),
                readiness=Readiness(leaving=leaving, halted=halts),
            )
            assert [one.slug for one in made.actions] == begun, (halted, leaving)


@settings(max_examples=200, deadline=None)
@given(fleets())
def test_a_request_is_met_once(fleet: tuple[World, dict[Slug, MoveRequest]]) -> None:
    """Each placement that is to be left is replaced once, and its successor stays, although the request does."""
    world, requested = fleet
    goals = replace(GOALS, requested=requested)
    left: list[Slug] = []
    for _ in range(20):
        made = plan(world.records, world.placements, goals, Limits(replace_at_once=2))
        for action in made.actions:
            left += [action.slug] if action.kind is ActionKind.REPLACE else []
            world.apply(action)
        world.settle()
    wanted = {slug for slug, one in requested.items() if one.ref != "gone"}
    old = {slug for slug, (first, *_) in world.placements.items() if first.spec_hash == OLD_SPEC}
    assert sorted(left) == sorted(wanted | old)
    assert not plan(world.records, world.placements, goals, Limits()).actions


def test_a_request_is_met_in_place_too() -> None:
    """Where a scheduler updates a placement in place, its next epoch has the same reference, and stays."""
    one = placement("a", 2, ref="job")
    world = World([record("a", epoch=2)], [one])
    for epoch, replaced in ((1, 0), (2, 1), (0, 1)):
        goals = replace(
            GOALS, requested={one.slug: MoveRequest(Move.RELIEF, "job", "", epoch=epoch)}
        )
        made = plan(world.records, world.placements, goals, Limits())
        assert len(made.actions) == replaced


def test_of_two_requests_the_more_urgent_one_counts() -> None:
    """Of two requests for one device, that of the more urgent reason is met, in whatever order they come."""
    drain, relief = (MoveRequest(move, "ref", move.name) for move in (Move.DRAIN, Move.RELIEF))
    (slug, other) = SLUGS[:2]
    assert combined({slug: relief}, {slug: drain, other: relief}, {slug: relief}) == {
        slug: drain,
        other: relief,
    }


def test_a_version_that_was_given_up_leaves_before_others() -> None:
    """With room for one, the agent of a spec that was given up goes before one that is only outdated."""
    found = [placement("a", 1, spec=OLD_SPEC), placement("b", 1, spec="bad")]
    world = World([record("a", epoch=1), record("b", epoch=1)], found)
    limits = Limits(replace_at_once=1, replace_fraction=0.0)
    goals = replace(GOALS, given_up=frozenset({"bad"}))
    (action,) = plan(world.records, world.placements, goals, limits).actions
    assert (action.slug, action.move) == (found[1].slug, Move.ROLLBACK)


def test_a_device_on_trial_keeps_the_spec_of_its_trial() -> None:
    """A device that has its turn in a roll-out gets the spec on trial, and the others keep theirs."""
    found = [placement("a", 1), placement("b", 1)]
    world = World([record("a", epoch=1), record("b", epoch=1)], found)
    goals = replace(GOALS, trials={found[0].slug: "next"})
    (action,) = plan(world.records, world.placements, goals, Limits()).actions
    assert (action.slug, action.move) == (found[0].slug, Move.ROLLOUT)
