"""The planner on every small world: L1, S1, S2, S3, S7, no needless work, order independence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core import planner
from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.core.goals import Goals
from nomad_watchdog.core.migration import NEVER_MIGRATED
from nomad_watchdog.core.planner import Plan, plan, stop_key
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import DeviceRecord, Limits, PlacementState, Presence, WallTime
from tests.core.world import GOALS, OLD_SPEC, SPEC, World, placement, record

_NOT_REPLACED = (PlacementState.STOPPING, PlacementState.LOST)
"""What a roll-out leaves as it is: it is being stopped, or no other could start."""
WIDE = Limits(breaker_min=10_000, replace_at_once=10_000)
NAMES = [f"device-{n}" for n in range(6)]

states = st.sampled_from(list(PlacementState))
placements_of = st.lists(
    st.tuples(st.integers(1, 4), states, st.sampled_from([SPEC, OLD_SPEC])),
    max_size=3,
    unique_by=lambda t: t[0],
)
devices = st.fixed_dictionaries(
    {},
    optional={
        name: st.tuples(st.booleans(), st.integers(0, 4), st.booleans(), placements_of)
        for name in NAMES
    },
)
strays = st.dictionaries(st.sampled_from(["stray-1", "stray-2"]), placements_of)


def build(known: dict, unknown: dict) -> World:
    records = []
    found = []
    for name, (present, epoch, bound, runs) in known.items():
        records.append(
            record(name, epoch=epoch, present=present, instance="seen" if bound and epoch else "")
        )
        found += [placement(name, e, s, spec=h) for e, s, h in runs]
    for name, runs in unknown.items():
        found += [placement(name, e, s, spec=h) for e, s, h in runs]
    return World(records, found)


def decide(world: World, limits: Limits = WIDE, **more: object) -> Plan:
    return plan(world.records, world.placements, GOALS, limits, **more)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(devices, strays, st.randoms(use_true_random=False))
def test_l1_plans_converge_whatever_is_lost_on_the_way(
    known: dict, unknown: dict, chance: random.Random
) -> None:
    """Whatever subset of each plan is executed, each present device ends with one live placement."""
    world = build(known, unknown)
    for turn in range(40):
        actions = list(decide(world).actions)
        if turn < 10:  # interrupted passes: any subset, in any order
            chance.shuffle(actions)
            actions = actions[: chance.randint(0, len(actions))]
        for action in actions:
            world.apply(action)
        if chance.random() < 0.5:
            world.settle()
    world.settle()
    for action in decide(world).actions:
        world.apply(action)
    world.settle()

    assert decide(world).actions == ()
    for slug, rec in world.records.items():
        live = world.live(slug)
        if rec.presence is Presence.PRESENT:
            (only,) = live
            assert only.epoch == rec.epoch
            assert only.spec_hash == SPEC or only.state in _NOT_REPLACED
        else:
            assert live == []
    for slug in world.placements.keys() - world.records.keys():
        assert world.live(slug) == []


@settings(max_examples=200, deadline=None)
@given(devices, strays)
def test_s2_every_start_carries_an_epoch_that_nobody_was_seen_at(
    known: dict, unknown: dict
) -> None:
    """A start never takes an epoch below the registry's, nor that of an existing placement."""
    world = build(known, unknown)
    for action in decide(world).actions:
        if action.kind is ActionKind.START:
            rec = world.records[action.slug]
            used = {p.epoch for p in world.placements.get(action.slug, ())}
            assert action.epoch >= max(rec.epoch, 1)
            assert action.epoch not in used
            assert action.epoch > rec.epoch or not rec.instance


@settings(max_examples=200, deadline=None)
@given(devices, strays)
def test_s3_nothing_starts_beside_a_process_that_may_live(known: dict, unknown: dict) -> None:
    """No start is planned for a device with any placement that is not dead."""
    world = build(known, unknown)
    for action in decide(world).actions:
        if action.kind is ActionKind.START:
            assert world.live(action.slug) == []


@settings(max_examples=200, deadline=None)
@given(devices, strays)
def test_a_mistake_in_the_rules_starts_nothing_unsafe(known: dict, unknown: dict) -> None:
    """Even with a rule that starts an agent for every device, at any epoch, the plan contains only safe starts; the
    others are in `refused`, and none is lost."""
    world = build(known, unknown)
    asked = set()

    def start_always(rec: DeviceRecord, *_: object) -> Iterator[Action]:
        asked.add(rec.slug)
        return iter([planner._start(rec, (), NEVER_MIGRATED)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "decide", start_always)
        made = decide(world)
    starts = [action for action in made.actions if action.kind is ActionKind.START]
    for action in starts:
        assert world.live(action.slug) == []
        assert all(one.epoch <= action.epoch for one in world.placements.get(action.slug, ()))
        assert world.records[action.slug].presence is Presence.PRESENT
    refused = {action.slug for action in made.refused}
    assert refused.isdisjoint(action.slug for action in starts)
    assert refused | {action.slug for action in starts} == asked
    assert refused >= {slug for slug in asked if world.live(slug)}


@settings(max_examples=200, deadline=None)
@given(devices, strays, st.randoms(use_true_random=False))
def test_order_of_the_inputs_does_not_matter(
    known: dict, unknown: dict, chance: random.Random
) -> None:
    """Shuffling the registry and the placements gives the same plan."""
    world = build(known, unknown)
    first = decide(world)
    records = list(world.records.items())
    found = [
        (slug, tuple(chance.sample(runs, len(runs)))) for slug, runs in world.placements.items()
    ]
    chance.shuffle(records)
    chance.shuffle(found)

    assert plan(dict(records), dict(found), GOALS, WIDE) == first


@settings(max_examples=200, deadline=None)
@given(devices, strays, st.integers(0, 3))
def test_s7_no_pass_stops_more_than_the_breaker_allows(
    known: dict, unknown: dict, breaker_min: int
) -> None:
    """Unconfirmed stops are all executed or all held; with the limit at n, never more than n."""
    world = build(known, unknown)
    limits = Limits(breaker_min=breaker_min, breaker_fraction=0.0)
    made = decide(world, limits)
    stops = [a for a in made.actions if a.kind is ActionKind.RETIRE]

    assert len(stops) <= breaker_min
    if made.held:
        assert stops == []
        assert not any(a.kind is ActionKind.REPLACE for a in made.actions)
        assert made.hold_reason
        again = decide(world, limits, confirmed=made.held)
        assert {stop_key(a) for a in again.actions if a.kind is ActionKind.RETIRE} == made.held


def test_s7_an_empty_registry_stops_nothing() -> None:
    """100 running agents and no records at all: every stop is held."""
    world = World([], [placement(f"d{n}", 1) for n in range(100)])
    made = decide(world, Limits())

    assert made.actions == ()
    assert len(made.held) == 100


def test_a_settled_fleet_gets_no_action() -> None:
    """A device whose agent runs at the registry's epoch with the class's spec needs nothing."""
    world = World(
        [record(f"d{n}", epoch=3) for n in range(50)], [placement(f"d{n}", 3) for n in range(50)]
    )

    assert decide(world, Limits()) == Plan(())


@pytest.mark.parametrize(
    "state", [PlacementState.PENDING, PlacementState.RESTARTING, PlacementState.LOST]
)
def test_what_the_scheduler_is_handling_is_left_to_it(state: PlacementState) -> None:
    """Pending, restarting and lost placements at the right epoch are neither stopped nor duplicated."""
    world = World([record("a", epoch=2)], [placement("a", 2, state)])

    assert decide(world).actions == ()


def test_an_unknown_class_changes_nothing() -> None:
    """Without a spec for the class nothing is started, and running agents are left alone."""
    world = World([record("a"), record("b", epoch=1)], [placement("b", 1, spec="whatever")])

    assert plan(world.records, world.placements, Goals({}), WIDE).actions == ()


def test_a_lost_answer_is_asked_for_again_at_the_same_epoch() -> None:
    """An epoch that was committed but at which no agent was ever seen is used, not skipped."""
    (action,) = decide(World([record("a", epoch=4)], [])).actions

    assert (action.kind, action.epoch) == (ActionKind.START, 4)


def test_a_registry_behind_the_scheduler_catches_up() -> None:
    """After a restore, an agent with a newer epoch is retired and the next epoch is higher."""
    world = World([record("a", epoch=1, instance="x")], [placement("a", 7)])
    (stop,) = decide(world).actions
    world.apply(stop)
    world.settle()
    (start,) = decide(world).actions

    assert stop.kind is ActionKind.RETIRE
    assert start.epoch == 8


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(0, 60))
def test_a_roll_out_keeps_to_its_window(fleet: int, unready: int) -> None:
    """Replacements admitted plus devices without a ready agent never exceed the window."""
    limits = Limits(replace_at_once=5, replace_fraction=0.1)
    world = World(
        [record(f"d{n}", epoch=1) for n in range(fleet)],
        [placement(f"d{n}", 1, spec=OLD_SPEC) for n in range(fleet)],
    )
    made = decide(world, limits, readiness=Readiness(unready))
    window = max(5, int(fleet * 0.1))

    assert len(made.actions) == min(fleet, max(0, window - unready))
    assert made.waiting_rollout == fleet - len(made.actions)
    assert planner.NO_STOPS == made.held


def test_s7_a_record_that_cannot_be_read_stops_nobody() -> None:
    """The agent of a device with an unreadable record is left alone, and a real stray is still retired."""
    found = {name: (placement(name, 1),) for name in ("poisoned", "stray")}
    placements = {runs[0].slug: runs for runs in found.values()}
    poisoned, stray = (runs[0].slug for runs in found.values())
    made = plan({}, placements, GOALS, Limits(), resting=frozenset({poisoned}))

    assert [action.slug for action in made.actions] == [stray]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.integers(0, 100))
def test_agents_that_never_got_ready_make_way_for_the_next_version(fleet: int, bad: int) -> None:
    """However much of the window a bad version fills, its stuck agents are all replaced by the next version, and ready
    ones only as far as the window has room."""
    bad = min(bad, fleet)
    limits = Limits(replace_at_once=5, replace_fraction=0.1)
    world = World(
        [record(f"d{n}", epoch=1) for n in range(fleet)],
        [placement(f"d{n}", 1, spec=OLD_SPEC) for n in range(fleet)],
    )
    stuck = {slug_of(DeviceId(f"d{n}")) for n in range(bad)}
    made = plan(
        world.records,
        world.placements,
        GOALS,
        limits,
        readiness=Readiness(bad, stuck.__contains__),
    )
    replaced = {action.slug for action in made.actions}
    room = max(0, max(5, int(fleet * 0.1)) - bad)

    assert stuck <= replaced
    assert len(replaced - stuck) == min(fleet - bad, room)
    assert made.waiting_rollout == fleet - len(replaced)


def test_of_two_placements_of_one_epoch_the_oldest_is_kept() -> None:
    """This holds whichever is accepted: the backend and the other replicas, which may not know of the acceptance yet,
    choose the oldest too."""
    oldest = replace(placement("a", 1), ref="z", created_at=WallTime(1.0))
    surplus = replace(placement("a", 1), ref="b", created_at=WallTime(2.0), instances=("first",))
    rec = record("a", epoch=1, instance="first")

    (action,) = decide(World([rec], [surplus, oldest])).actions

    assert (action.kind, action.placement) == (ActionKind.RETIRE, surplus)


def test_a_placement_that_stops_does_not_cost_the_one_that_stays() -> None:
    """If one of two placements of an epoch is stopping, the other is left alone, however old it is: otherwise both
    would be gone, and the epoch with them."""
    stopping = replace(placement("a", 1, PlacementState.STOPPING), created_at=WallTime(1.0))
    stays = replace(placement("a", 1), ref="stays", created_at=WallTime(2.0))
    rec = record("a", epoch=1, instance=stopping.instances[0])

    assert decide(World([rec], [stopping, stays])).actions == ()
