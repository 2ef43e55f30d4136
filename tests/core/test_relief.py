"""Which agents leave which hosts, over any history of loads and outcomes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core import relief
from nomad_watchdog.core.host_load import Load, LoadTrack, PressureThresholds
from nomad_watchdog.core.relief import (
    BEGIN_S,
    MAX_DOUBLINGS,
    MAX_RESTS,
    WITHDRAWN_S,
    Candidate,
    ReliefMove,
    ReliefProgress,
    ReliefRules,
    ReliefState,
    Rest,
)
from nomad_watchdog.host_pressure import Resource
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, WallTime

RULES = ReliefRules({Resource.MEMORY: PressureThresholds(40.0, 10.0)}, dry_run=False)
HOT = LoadTrack(Load.OVERLOADED, above=3, readings=3, excess=2.0, worst="memory pressure 80 %")
CALM = LoadTrack(Load.CALM, below=3, readings=3)
MIXED = LoadTrack(Load.OVERLOADED, readings=1)
NOW = WallTime(10_000.0)


def agents(*names: str, age_s: float | None = 700.0) -> list[Candidate]:
    return [Candidate(Slug(name), Epoch(1), f"ref-{name}", age_s) for name in names]


def decided(
    state: ReliefState = ReliefState(),  # noqa: B008  # frozen
    tracks: dict[str, LoadTrack] | None = None,
    rules: ReliefRules = RULES,
    now: WallTime = NOW,
    **options: object,
) -> relief.Decision:
    found = {"hot": agents("a", "b", "c"), **options}
    closed = found.pop("closed", ())
    tracks = tracks or {"hot": HOT, "calm": CALM}
    return relief.decide(state, tracks, found, closed, rules, now)  # type: ignore[arg-type]


def test_one_agent_leaves_an_overloaded_host_and_always_the_same() -> None:
    """One agent leaves per reading, the one with the lowest hash of slug and host, whatever their order is."""
    (move,) = decided().moves
    assert (move.host, move.epoch, move.since) == ("hot", 1, NOW)
    assert move.reason == "host hot is overloaded: memory pressure 80 %"
    assert decided(hot=agents("c", "b", "a")).moves == (move,)
    both = decided(rules=replace(RULES, per_host=2, at_once=5)).moves
    assert len(both) == 2
    assert both[0] == move


@pytest.mark.parametrize(
    "tracks",
    [
        {"hot": MIXED, "calm": CALM},
        {"hot": replace(HOT, above=2), "calm": CALM},
        {"hot": replace(HOT, load=Load.UNKNOWN, above=0), "calm": CALM},
        {"hot": CALM, "calm": CALM},
        {"calm": CALM},
    ],
)
def test_a_host_that_is_not_overloaded_now_is_left_alone(tracks: dict[str, LoadTrack]) -> None:
    """Without `looks` readings above the threshold in a row up to now nothing moves, and nothing is reported."""
    assert decided(tracks=tracks) == relief.Decision()


@pytest.mark.parametrize("other", [HOT, MIXED, LoadTrack(), replace(CALM, above=1)])
def test_nothing_moves_without_a_calm_host(other: LoadTrack) -> None:
    """A host of unknown load, one between the thresholds, and a calm one whose last reading is above are no places to
    go to. Neither is a closed one."""
    assert decided(tracks={"hot": HOT, "calm": other}).no_calm_host
    found = decided(closed={"calm"})
    assert (found.moves, found.no_calm_host, found.overloaded) == ((), True, ("hot",))


def test_closed_hosts_are_not_relieved() -> None:
    """Agents of a host that is being drained leave it for that reason."""
    assert decided(closed={"hot"}) == relief.Decision()


def test_young_agents_and_those_of_unknown_age_stay() -> None:
    """An agent younger than the minimum age stays, and so does one whose age is not known."""
    for age_s in (0.0, RULES.min_age_s - 1, None):
        assert not decided(hot=agents("a", age_s=age_s)).moves
    assert decided(hot=agents("a", age_s=RULES.min_age_s)).moves


def test_the_most_loaded_host_comes_first() -> None:
    """With room for one move, the host that exceeds its threshold most gets it."""
    tracks = {"hot": HOT, "hotter": replace(HOT, excess=3.0), "calm": CALM}
    (move,) = decided(tracks=tracks, hotter=agents("x")).moves
    assert move.slug == "x"
    both = decided(tracks=tracks, hotter=agents("x"), rules=replace(RULES, at_once=2)).moves
    assert [one.host for one in both] == ["hotter", "hot"]


def test_a_move_that_did_not_help_doubles_the_rest_and_one_that_helped_ends_that() -> None:
    """The rest of the host doubles with each move after which `looks` readings are above the threshold, up to a
    maximum; a reading below it ends the doubling."""
    now, state = NOW, ReliefState()
    for expected in (1, 2, 3, 4, 5, 5):
        state = relief.begin(state, decided(state, now=now).moves, RULES, now)
        state, ended = relief.settle(
            state, lambda _m: ReliefProgress.ARRIVED, lambda _m: True, RULES, now
        )
        assert len(ended) == 1
        early = {"hot": replace(HOT, above=1, readings=1)}
        assert relief.judge(state, early, RULES, now) == (state, ())
        assert not decided(state, now=WallTime(now + 10_000)).moves, "it is not judged yet"
        state, failed = relief.judge(state, {"hot": HOT}, RULES, now)
        assert failed == ("hot",)
        rest = state.hosts["hot"]
        assert rest.doublings == expected <= MAX_DOUBLINGS
        assert rest.until - now == RULES.cooldown_s * 2**expected
        assert not decided(state, now=WallTime(rest.until - 1)).moves
        now = WallTime(rest.until + 1)
        state = replace(state, devices={})
    state = relief.begin(state, decided(state, now=now).moves, RULES, now)
    state, _ = relief.settle(state, lambda _m: ReliefProgress.ARRIVED, lambda _m: True, RULES, now)
    state, failed = relief.judge(state, {"hot": replace(MIXED, above=0)}, RULES, now)
    assert failed == ()
    assert (state.hosts["hot"].doublings, state.hosts["hot"].judged) == (0, True)


def test_a_return_to_the_same_host_did_not_help() -> None:
    """If the scheduler places the agent on the host that it left, the rest of the host doubles at once."""
    state = relief.begin(ReliefState(), decided().moves, RULES, NOW)
    state, _ = relief.settle(state, lambda _m: ReliefProgress.RETURNED, lambda _m: True, RULES, NOW)
    assert state.hosts["hot"] == Rest(WallTime(NOW + 600), 1)


def test_a_move_that_does_not_begin_is_withdrawn_and_counts_for_a_while() -> None:
    """A move that has not begun when it is needed no more, or too late, is withdrawn. It still takes its place for a
    while, because another replica may just begin it; one that has begun is never withdrawn."""
    (move,) = decided().moves
    begun = relief.begin(ReliefState(), [move], RULES, NOW)

    def settled(state: ReliefState, after_s: float, needed: bool = True) -> ReliefState:
        now = WallTime(NOW + after_s)
        return relief.settle(
            state, lambda _m: ReliefProgress.WAITING, lambda _m: needed, RULES, now
        )[0]

    assert settled(begun, BEGIN_S - 1) == begun
    assert settled(begun, BEGIN_S).moves[0].withdrawn
    withdrawn = settled(begun, 5.0, needed=False)
    assert withdrawn.moves == (replace(move, withdrawn=WallTime(NOW + 5)),)
    assert settled(withdrawn, WITHDRAWN_S) == withdrawn
    assert settled(withdrawn, WITHDRAWN_S + 5).moves == ()
    assert settled(withdrawn, WITHDRAWN_S + 5).hosts["hot"].judged
    on_way = relief.settle(
        withdrawn, lambda _m: ReliefProgress.ON_WAY, lambda _m: False, RULES, NOW
    )
    assert on_way == (withdrawn, ())


steps = st.lists(
    st.tuples(
        st.floats(1, 2_000),
        st.dictionaries(
            st.sampled_from(["h0", "h1", "h2", "h3"]), st.sampled_from([HOT, CALM, MIXED])
        ),
        st.sampled_from([one for one in ReliefProgress if one is not ReliefProgress.WITHDRAWN]),
    ),
    max_size=40,
)


@given(steps, st.integers(1, 3), st.integers(1, 3))
def test_limits_hold_over_any_history(
    history: list[tuple[float, dict[str, LoadTrack], ReliefProgress]], per_host: int, at_once: int
) -> None:
    """Whatever the loads and outcomes are: at most `at_once` moves are in progress, at most `per_host` begin on a host
    at a time, a host and a device rest after a move, and what is remembered is bounded."""
    rules = replace(RULES, per_host=per_host, at_once=at_once)
    state, now = ReliefState(), NOW
    last: dict[str, float] = {}
    names = [f"d{number}" for number in range(8)]
    for gap_s, tracks, outcome in history:
        now = WallTime(now + gap_s)
        state, _ = relief.settle(
            state, lambda _m, found=outcome: found, lambda _m: False, rules, now
        )  # type: ignore[misc]  # mypy does not infer the lambda with a default
        state, _ = relief.judge(state, tracks, rules, now)
        state = relief.tidy(state, rules, now)
        found = {f"h{n}": agents(*names[2 * n : 2 * n + 2]) for n in range(4)}
        decision = relief.decide(state, tracks, found, (), rules, now)
        state = relief.begin(state, decision.moves, rules, now)
        assert len(state.moves) <= max(at_once, 0)
        assert max(Counter(move.host for move in decision.moves).values(), default=0) <= per_host
        assert len({move.slug for move in state.moves}) == len(state.moves)
        for move in decision.moves:
            assert tracks[move.host] is HOT
            assert CALM in tracks.values()
        for name in {move.host for move in decision.moves} | {m.slug for m in decision.moves}:
            assert now - last.get(name, float("-inf")) >= rules.cooldown_s
            last[name] = now


@given(st.floats(1.0e9, 2.0e9), st.floats(60, 10_000))
def test_a_rest_that_has_just_begun_is_kept(at: float, cooldown_s: float) -> None:
    """Whatever the time is, rounding does not make a new rest look like one of a clock that was set wrong: a host does
    not get its next move at once."""
    rules, now = replace(RULES, cooldown_s=cooldown_s), WallTime(at)
    state = relief.begin(ReliefState(), decided(now=now).moves, rules, now)
    state, _ = relief.settle(state, lambda _m: ReliefProgress.ARRIVED, lambda _m: True, rules, now)
    assert relief.tidy(state, rules, now) == state
    state, failed = relief.judge(state, {"hot": HOT}, rules, now)
    assert failed
    assert relief.tidy(state, rules, now) == state
    assert not decided(relief.tidy(state, rules, now), rules=rules, now=now).moves


def test_rests_are_forgotten_and_bounded() -> None:
    """A rest is forgotten when it has been over for as long as it lasted, or if the clock was set back; at most
    MAX_RESTS are kept, the latest ones."""
    rest = Rest(WallTime(NOW + 300))
    state = ReliefState(
        devices={Slug("a"): rest, Slug("b"): replace(rest, until=WallTime(NOW - 300))}
    )
    assert relief.tidy(state, RULES, NOW) == state
    assert relief.tidy(state, RULES, WallTime(NOW + 2)).devices == {"a": rest}
    assert relief.tidy(state, RULES, WallTime(NOW - 5_000)).devices == {}
    many = {Slug(f"d{n}"): Rest(WallTime(NOW + n / 10)) for n in range(MAX_RESTS + 5)}
    kept = relief.tidy(ReliefState(devices=many), RULES, NOW).devices
    assert len(kept) == MAX_RESTS
    assert Slug("d0") not in kept


def test_a_move_in_progress_is_not_begun_again() -> None:
    """While a move from a host is in progress no other begins there, even with room for more."""
    rules = replace(RULES, at_once=5)
    state = relief.begin(ReliefState(), decided(rules=rules).moves, rules, NOW)
    assert not decided(state, rules=rules, now=WallTime(NOW + 100_000)).moves
    move = ReliefMove(Slug("z"), Epoch(1), "r", "other", "why", NOW)
    assert decided(ReliefState((move,)), rules=rules).moves
    assert not decided(ReliefState((move,)), rules=RULES).moves
