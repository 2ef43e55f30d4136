"""What a pause covers, and that it leaves no trace."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core import pauses, planner
from nomad_watchdog.core.pauses import Pause, Target
from nomad_watchdog.model import Limits, PlacementState, WallTime
from tests.core.world import GOALS, OLD_SPEC, World, placement, record

NAMES = [f"d{n}" for n in range(8)]
targets = st.builds(
    Target,
    devices=st.frozensets(st.sampled_from(NAMES), max_size=4),
    agent_class=st.sampled_from(["", "default", "other"]),
    labels=st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy"), max_size=2),
)
moments = st.floats(0, 100).map(WallTime)


@st.composite
def some_pauses(draw: st.DrawFn) -> list[Pause]:
    return [
        Pause(f"p{n}", target, begins, ends, "", "", window)
        for n, (target, begins, ends, window) in enumerate(
            draw(
                st.lists(
                    st.tuples(targets, moments, st.none() | moments, st.booleans()), max_size=6
                )
            )
        )
    ]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    records, placements = [], []
    for name in NAMES:
        epoch = draw(st.integers(0, 3))
        records.append(record(name, epoch=epoch, present=draw(st.booleans())))
        for e in range(1, epoch + 1):
            state = draw(st.sampled_from(PlacementState))
            spec = draw(st.sampled_from(["spec-new", OLD_SPEC]))
            placements.append(placement(name, e, state, spec=spec))
    return World(records, placements)


def plan(world: World, resting: frozenset[str] = frozenset()) -> planner.Plan:
    return planner.plan(world.records, world.placements, GOALS, Limits(), resting=resting)


@given(worlds(), st.sets(st.sampled_from(NAMES)))
def test_nothing_is_planned_for_a_paused_device(world: World, names: set[str]) -> None:
    """No action names a paused device, and every other device gets the same action as without the pause."""
    resting = frozenset(r.slug for r in world.records.values() if str(r.device.id) in names)
    limits = Limits(breaker_min=1000, replace_at_once=1000)

    free = planner.plan(world.records, world.placements, GOALS, limits)
    held = planner.plan(world.records, world.placements, GOALS, limits, resting=resting)

    assert not {a.slug for a in held.actions} & resting
    assert held.actions == tuple(a for a in free.actions if a.slug not in resting)


@given(worlds(), some_pauses())
def test_a_pause_leaves_no_change_behind(world: World, made: list[Pause]) -> None:
    """When every pause is over, the plan equals that of a fleet that was never paused."""
    ended = [replace(p, ends=WallTime(100.0) if p.ends is None else p.ends) for p in made]
    late = pauses.active(ended, WallTime(101.0))
    resting = frozenset(pauses.paused(world.records.values(), late))

    assert plan(world, resting) == plan(world)


@given(some_pauses(), moments, st.randoms())
def test_which_devices_are_paused_does_not_depend_on_order(
    made: list[Pause], now: WallTime, chance: object
) -> None:
    """The same pauses in any order cover the same devices, with the same one as the reason."""
    records = [record(name) for name in NAMES]
    shuffled = list(made)
    chance.shuffle(shuffled)

    one = pauses.paused(records, pauses.active(made, now))

    assert one == pauses.paused(reversed(records), pauses.active(shuffled, now))
    for r in records:
        covered = any(p.is_active(now) and p.target.matches(r.device) for p in made)
        assert (r.slug in one) == covered


@given(some_pauses(), moments, moments)
def test_between_two_changes_the_same_pauses_are_in_force(
    made: list[Pause], now: WallTime, later: WallTime
) -> None:
    """Until the next start or end of a pause, nothing changes."""
    if now <= later < pauses.next_change(made, now):
        assert pauses.active(made, now) == pauses.active(made, later)


@given(some_pauses(), moments)
def test_s5_pausing_twice_is_pausing_once(made: list[Pause], now: WallTime) -> None:
    """The same pause under another ID replaces the first."""
    for pause in made:
        if pause.is_over(now):
            continue
        once = pauses.add(made, pause, now)
        twice = pauses.add(once, replace(pause, id="again"), now)
        assert len(twice) == len(once)
        assert sum(p.target == pause.target and p.window == pause.window for p in twice) >= 1


@given(some_pauses(), targets, moments)
def test_what_is_resumed_is_not_paused_by_it_any_more(
    made: list[Pause], target: Target, now: WallTime
) -> None:
    """Pausing a target and resuming it restores the previous state, except for the target's own pauses."""
    mine = Pause("mine", target, now, None, "", "")
    back = pauses.resume(pauses.add(made, mine, now), target, now)

    assert "mine" not in {p.id for p in back}
    assert back == pauses.resume(made, target, now)
    assert {p.id for p in made if p.window and not p.is_over(now)} <= {p.id for p in back}


def test_an_empty_target_matches_nothing() -> None:
    """A pause without a target pauses no device."""
    assert not Target().matches(record("a").device)


def test_one_device_can_be_taken_out_of_a_list() -> None:
    """The others stay paused, and removing the last one removes the pause."""
    pause = Pause("p", Target(frozenset({"a", "b"})), WallTime(0.0), None, "", "")
    (left,) = pauses.resume([pause], Target(frozenset({"a"})), WallTime(1.0))

    assert left.target.devices == {"b"}
    assert pauses.resume([left], Target(frozenset({"b"})), WallTime(1.0)) == ()
