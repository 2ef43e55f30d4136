"""An agent's scheduler is decided only by the record and the requested moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.controllers.migration_state import FORMAT, MigrationState, settings_hint
from nomad_watchdog.core import migration, planner
from nomad_watchdog.core.actions import ActionKind
from nomad_watchdog.core.migration import BackendAssignment, Migration
from nomad_watchdog.core.pauses import Target
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.ids import Shard, Slug, shard_of, slug_of
from nomad_watchdog.model import DeviceRecord, Limits, Placement, PlacementState, WallTime
from tests.core.world import GOALS, placement, record

BACKENDS = ("a", "b", "c")
NAMES = tuple(f"d{n}" for n in range(12))
SHARDS = 4


@st.composite
def moves(draw: st.DrawFn) -> Migration:
    """Any move between two of three schedulers. A finished one is not paused: ending it ends the pause."""
    done = draw(st.booleans())
    source, goal = draw(st.permutations(BACKENDS))[:2]
    some = draw(st.frozensets(st.sampled_from(NAMES), min_size=1))
    return Migration(
        id="m",
        source=source,
        goal=goal,
        began=WallTime(1.5),
        by="somebody",
        target=draw(st.sampled_from([None, Target(devices=some), Target(agent_class="default")])),
        shards=draw(st.sampled_from([frozenset(), frozenset({0, 2})])),
        of_shards=SHARDS,
        at_once=draw(st.integers(0, 3)),
        back=draw(st.booleans()),
        paused=not done and draw(st.booleans()),
        done=done,
    )


Fleet = tuple[BackendAssignment, dict[Slug, DeviceRecord], dict[Slug, tuple[Placement, ...]]]


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """Backend assignments, and records with placements on the backends of their epochs."""
    some = tuple(draw(st.lists(moves(), max_size=3)))
    homes = BackendAssignment(draw(st.sampled_from(BACKENDS)), "a", some, frozenset(BACKENDS))
    records, placements = {}, {}
    for name in NAMES:
        one = record(name, epoch=draw(st.integers(0, 3)), present=draw(st.booleans()))
        one = replace(one, home=draw(st.sampled_from(("", *BACKENDS))) if one.epoch else "")
        records[one.slug] = one
        state = draw(st.sampled_from([None, *PlacementState]))
        if one.epoch and state is not None:
            found = placement(name, one.epoch, state)
            here = homes.of(one)
            placements[one.slug] = (replace(found, backend="" if here == homes.usual else here),)
    return homes, records, placements


def shard(slug: Slug) -> Shard:
    return shard_of(slug, SHARDS)


@given(fleets())
def test_an_epoch_has_one_home(fleet: Fleet) -> None:
    """A start or a move on another scheduler than the record's always gets a higher epoch."""
    homes, records, placements = fleet
    for action in planner.plan(records, placements, replace(GOALS, homes=homes), Limits()).actions:
        one = records[action.slug]
        if action.kind is ActionKind.START and action.home != homes.of(one):
            assert action.epoch > one.epoch
        if action.kind is ActionKind.REPLACE:
            assert action.epoch == one.epoch  # and the executor commits the next one
            assert action.home not in ("", homes.at(action.placement))


@given(fleets())
def test_only_a_move_that_is_under_way_moves_anything(fleet: Fleet) -> None:
    """An agent is moved only by the newest move that covers its device, from that move's source to its destination;
    never while it is paused, and never from a lost node."""
    homes, records, placements = fleet
    for action in planner.plan(records, placements, replace(GOALS, homes=homes), Limits()).actions:
        if action.kind is not ActionKind.REPLACE:
            continue
        move = homes.move_of(records[action.slug])
        assert move is not None
        assert not move.paused
        assert (homes.at(action.placement), action.home) == (move.leaves, move.heads_for)
        assert action.placement.state is not PlacementState.LOST


@given(fleets(), st.integers(0, 6), st.integers(0, 5), st.integers(0, 4))
def test_no_more_move_at_a_time_than_may(
    fleet: Fleet, unready: int, moving: int, at_once: int
) -> None:
    """Started moves and those in progress stay within `at_once`, within the window, and in one shard."""
    homes, records, placements = fleet
    limits = Limits(replace_at_once=5, replace_fraction=0.0)

    turn = migration.frontier(homes, records, placements, lambda _record: True, shard)
    readiness = Readiness(
        unready=unready,
        turn=lambda slug: turn is not None and shard(slug) <= turn,
        moving=moving,
        moves_at_once=at_once,
    )
    plan = planner.plan(
        records,
        placements,
        replace(GOALS, homes=homes),
        limits,
        readiness=readiness,
        confirmed=frozenset(),
    )
    begun = [a for a in plan.actions if a.kind is ActionKind.REPLACE]
    assert len(begun) <= max(0, (at_once or 5) - moving)
    assert len(begun) <= max(0, 5 - unready)
    assert len({shard(a.slug) for a in begun}) <= 1


@given(fleets())
def test_the_frontier_is_the_lowest_shard_that_can_go_on(fleet: Fleet) -> None:
    """The frontier has a device to move, no lower shard has one, and without such a device there is no frontier."""
    homes, records, placements = fleet
    at = migration.frontier(homes, records, placements, lambda _record: True, shard)
    free = {
        shard(a.slug)
        for a in planner.plan(
            records,
            placements,
            replace(GOALS, homes=homes),
            Limits(replace_at_once=100, breaker_min=100),
        ).actions
        if a.kind is ActionKind.REPLACE
    }
    assert at == min(free, default=None)


@given(fleets())
def test_every_scheduler_with_agents_is_looked_at(fleet: Fleet) -> None:
    """The scheduler of a device, of a leftover agent or of a new device's start is always included."""
    homes, records, placements = fleet
    needed = migration.needed(homes, records, placements)
    for slug, one in records.items():
        assert not one.epoch or homes.of(one) in needed
        assert homes.move_of(one) is None or homes.for_start(record("new")) in {
            *needed,
            homes.usual,
        }
        for found in placements.get(slug, ()):
            assert found.state is PlacementState.DEAD or homes.at(found) in needed


@given(st.lists(moves(), max_size=4), st.frozensets(st.sampled_from(BACKENDS)))
def test_what_is_kept_is_read_back(some: list[Migration], backends: frozenset[str]) -> None:
    """The registry document is decoded without loss."""
    kept = MigrationState("a", backends, tuple(some))
    assert FORMAT.decode(FORMAT.encode(kept)) == kept


@given(moves())
def test_a_move_that_is_done_is_not_read_as_paused(move: Migration) -> None:
    """A document with both flags, for example after manual editing, does not send new devices to the old scheduler."""
    edited = MigrationState("a", frozenset(BACKENDS), (replace(move, done=True, paused=True),))
    (read,) = FORMAT.decode(FORMAT.encode(edited)).moves
    assert (read.done, read.paused) == (True, False)


@given(moves(), moves())
def test_one_move_at_a_time(first: Migration, second: Migration) -> None:
    """While one is in progress, even paused, another is rejected; afterwards one that was undone is forgotten."""
    if first.done:
        after = migration.begin([first], second)
        assert after[-1] == second
        assert (first in after) == (first == second or not (first.back or second.is_whole))
    else:
        with pytest.raises(ConflictError, match="migration from"):
            migration.begin([first], second)


def test_a_finished_move_says_what_to_change_and_moves_nothing_back() -> None:
    """With the old `backend` after a move of all devices, new ones go to the new scheduler, the others stay there, and
    the hint names the setting."""
    done = Migration("m", "a", "b", WallTime(0.0), "", done=True)
    homes = BackendAssignment("a", "a", (done,), frozenset({"a", "b"}))
    there = replace(record("x", epoch=2), home="b")
    assert homes.goal(there) == homes.for_start(there) == homes.for_start(record("new")) == "b"
    assert homes.for_start(record("back again", epoch=1)) == "b"
    assert 'backend = "b"' in settings_hint(MigrationState("a", frozenset({"b"}), (done,)), "a")
    assert settings_hint(MigrationState("a", frozenset({"b"}), (done,)), "b") == ""


def test_a_device_that_cannot_move_holds_up_no_other() -> None:
    """A paused device, or one whose class is not configured, is skipped."""
    move = Migration("m", "a", "b", WallTime(0.0), "")
    homes = BackendAssignment("a", "a", (move,), frozenset({"a", "b"}))
    ordered = sorted((record(name, epoch=1) for name in NAMES), key=lambda one: shard(one.slug))
    records = {one.slug: one for one in ordered}
    placements = {one.slug: (placement(one.device.id, 1),) for one in ordered}
    first, last = shard(ordered[0].slug), shard(ordered[-1].slug)
    assert first < last
    at = migration.frontier(homes, records, placements, lambda one: shard(one.slug) == last, shard)
    assert at == last


def test_progress_counts_what_has_not_ended() -> None:
    """A move is over only when every device has arrived and no agent is left at the source."""
    move = Migration("m", "a", "b", WallTime(0.0), "")
    homes = BackendAssignment("a", "a", (move,), frozenset({"a", "b"}))
    gone = replace(record("x", epoch=2), home="b")
    stays = record("y", epoch=1)
    old, late = placement("x", 1, PlacementState.STOPPING), placement("y", 1)
    now = migration.progress(
        move, homes, {gone.slug: gone, stays.slug: stays},
        {gone.slug: (old,), stays.slug: (late,)}, lambda _slug: True,
    )  # fmt: skip
    assert (now.covered, now.there, now.on_way, now.leftover) == (2, 1, 0, 1)
    assert not now.is_over
    started = migration.progress(move, homes, {gone.slug: gone}, {}, lambda _slug: False)
    assert (started.on_way, started.is_over) == (1, False)
    assert migration.progress(move, homes, {gone.slug: gone}, {}, lambda _slug: True).is_over


def test_a_device_of_an_unknown_scheduler_is_left_alone() -> None:
    """A device whose scheduler is not configured must not be taken for gone."""
    homes = BackendAssignment("a", "a", (), frozenset({"a"}))
    there = replace(record("x", epoch=2), home="z")
    assert list(homes.strangers({there.slug: there})) == [slug_of(there.device.id)]


def test_an_epoch_that_may_be_on_its_way_is_repeated_where_it_belongs() -> None:
    """If a device left while a start in the north was unanswered, and returns after the move is over, it starts in the
    north at that epoch. A new start in the south could run beside the late one."""
    move = Migration("m", "north", "south", WallTime(0.0), "", done=True)
    homes = BackendAssignment("north", "north", (move,), frozenset({"north", "south"}))
    back = record("x", epoch=5)
    (action,) = planner.decide(back, (), replace(GOALS, homes=homes))
    assert (action.kind, action.epoch, action.home) == (ActionKind.START, 5, "north")
    # If the agent was seen to end, no start is outstanding, and the next one goes to the new scheduler.
    (action,) = planner.decide(
        back, (placement("x", 5, PlacementState.DEAD),), replace(GOALS, homes=homes)
    )
    assert (action.epoch, action.home) == (6, "south")
