"""The repair ladder and the authority to act: the next step after any history. Pure, with times from Hypothesis."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watchdog_agent.repairs import ladder as words
from watchdog_agent.repairs.authority import ASK, ActAuthority
from watchdog_agent.repairs.ladder import Ladder
from watchdog_agent.reporting.reporter import holds_repairs


def step(name: str = "a", **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "name": f"interface {name}",
        "kind": "interface",
        "budget": 2,
        "window_s": 100.0,
        "cooldown_s": 5.0,
        "verify_s": 3.0,
        "tries": 1,
        "when": "suspect",
        "probe": "",
        "even_behind_gateway": False,
        **changes,
    }


def test_steps_are_taken_in_order_and_each_is_verified_before_the_next() -> None:
    """A second step is taken only after the first has ended and no probe answered within its verification time."""
    ladder = Ladder([step("a"), step("b")])
    what, first, _, _ = ladder.next("suspect", (), 0.0)
    assert (what, first["id"]) == (words.TAKE, "a")
    ladder.begin_attempt(first, 0.0)
    assert ladder.next("suspect", (), 1.0)[0] == words.WAIT
    ladder.ended(True, "done", 2.0)
    assert ladder.next("suspect", (), 4.9)[:3] == (words.WAIT, None, 5.0)
    what, second, _, _ = ladder.next("suspect", (), 5.0)
    assert (what, second["id"]) == (words.TAKE, "b")
    assert ladder.attempts[0]["outcome"] == words.NO_HELP


def test_exhausted_only_when_offline() -> None:
    """With no step left, the ladder waits for a suspect device and gives up on an offline one."""
    ladder = Ladder([step("a")])
    ladder.begin_attempt(ladder.next("suspect", (), 0.0)[1], 0.0)
    ladder.ended(False, "no", 1.0)
    assert ladder.next("suspect", (), 2.0)[0] == words.WAIT
    assert ladder.next("offline", (), 2.0)[0] == words.EXHAUSTED


def test_without_a_route_only_the_interface_is_cycled() -> None:
    """An agent whose host has no route takes only the steps for suspect devices that repair its own interface; with
    none left it waits, and escalates nothing as offline. Without such a step it rests."""
    others = [step("web", kind="http"), step("later", when="offline")]
    ladder = Ladder([*others, step("a"), step("b")])
    for name in ("a", "b"):
        what, taken, _, _ = ladder.next("no route", (), 0.0)
        assert (what, taken["id"]) == (words.TAKE, name)
        ladder.begin_attempt(taken, 0.0)
        ladder.ended(False, "no", 0.0)
    assert ladder.next("no route", (), 0.0)[:2] == (words.WAIT, None)
    assert Ladder(others[:1]).next("no route", (), 0.0)[0] == words.REST


def test_a_step_whose_effect_could_not_be_asked_has_neither_helped_nor_failed() -> None:
    """If no probe was able to run within the step's verification time the outcome is unable; one miss among them means
    no help."""
    for asked, outcome in (
        ([False, False], words.UNABLE),
        ([False, True, False], words.NO_HELP),
        ([], words.NO_HELP),
    ):
        ladder = Ladder([step("a"), step("b")])
        ladder.begin_attempt(ladder.next("suspect", (), 0.0)[1], 0.0)
        ladder.missed(asked=False)  # the step is still running: this verifies nothing
        ladder.ended(True, "done", 1.0)
        for one in asked:
            ladder.missed(asked=one)
        assert ladder.next("unable", (), 3.0)[0] == words.WAIT
        # No step is taken while the device is unable; the ladder continues afterwards.
        assert ladder.next("unable", (), 5.0)[:2] == (words.WAIT, None)
        assert ladder.attempts[0]["outcome"] == outcome
        assert ladder.next("suspect", (), 6.0)[1]["id"] == "b"
        assert json.loads(json.dumps(ladder.dump(6.0)))["attempts"][0]["outcome"] == outcome


def test_a_degraded_device_is_left_to_the_steps_that_are_for_that() -> None:
    """Steps with `when = "degraded"`, and no others, are taken for degraded devices; with none left it is exhausted. An
    unable device starts no episode."""
    ladder = Ladder(
        [step("a"), step("b", when="offline"), step("c", when="degraded", cooldown_s=0.0)]
    )
    assert ladder.next("unable", (), 0.0)[0] == words.REST
    assert not ladder.open
    what, found, _, _ = ladder.next("degraded", (), 0.0)
    assert (what, found["id"]) == (words.TAKE, "c")
    ladder.begin_attempt(found, 0.0)
    ladder.ended(True, "done", 1.0)
    assert ladder.next("degraded", (), 4.0)[0] == words.EXHAUSTED
    assert ladder.next("offline", (), 5.0)[1]["id"] == "a"


def test_a_harsh_step_is_not_taken_because_a_mild_one_rests() -> None:
    """In a new episode the ladder waits for a step that is cooling down, and does not skip it."""
    ladder = Ladder([step("a"), step("b")])
    ladder.begin_attempt(ladder.next("suspect", (), 0.0)[1], 0.0)
    ladder.ended(True, "done", 1.0)
    assert ladder.answered(2.0)
    assert ladder.attempts[0]["outcome"] == words.RECOVERED
    assert ladder.next("suspect", (), 3.0)[:3] == (words.WAIT, None, 5.0)
    assert ladder.next("suspect", (), 5.0)[1]["id"] == "a"


def test_preconditions() -> None:
    """A step for an offline device waits until it is offline; one that names a probe waits until that probe misses."""
    ladder = Ladder([step("a", when="offline"), step("b", probe="tcp:22")])
    assert ladder.next("suspect", ("icmp",), 0.0)[0] == words.WAIT
    assert ladder.next("suspect", ("tcp:22",), 0.0)[1]["id"] == "b"
    assert ladder.next("offline", ("tcp:22",), 0.0)[1]["id"] == "a"


def test_a_flapping_device_spends_the_budget_and_no_more() -> None:
    """A device that recovers after each step gets `budget` steps per window, and is then given up."""
    ladder = Ladder([step("a", cooldown_s=0.0)])
    taken, now = 0, 0.0
    for _ in range(10):
        what, found, _, _ = ladder.next("offline", (), now)
        if what == words.TAKE:
            taken += 1
            ladder.begin_attempt(found, now)
            ladder.ended(True, "done", now + 1)
        else:
            assert what == words.EXHAUSTED
        assert ladder.answered(now + 2)
        now += 5.0
    assert taken == 2
    assert ladder.next("suspect", (), 200.0)[0] == words.TAKE


def test_a_step_that_could_not_be_kept_was_not_taken() -> None:
    """Discarding an attempt returns its try and its budget."""
    ladder = Ladder([step("a", budget=1)])
    found = ladder.next("suspect", (), 0.0)[1]
    ladder.begin_attempt(found, 0.0)
    ladder.discard_attempt(0.0)
    assert ladder.next("suspect", (), 0.0)[0] == words.TAKE
    assert ladder.attempts == []


def test_steps_wait_while_the_gateway_is_dead() -> None:
    """Behind a dead gateway the ladder skips steps for the device, takes those for the gateway, then waits; with an
    offline device and no step left it is exhausted, and continues when the gateway is back."""
    ladder = Ladder([step("a"), step("gw", even_behind_gateway=True)])
    what, found, _, _ = ladder.next("suspect", (), 0.0, behind=True)
    assert (what, found["id"]) == (words.TAKE, "gw")
    ladder.begin_attempt(found, 0.0)
    ladder.ended(True, "", 0.0)
    assert ladder.next("suspect", (), 4.0, behind=True) == (words.WAIT, None, None, words.BEHIND)
    assert ladder.next("offline", (), 4.0, behind=True)[0] == words.EXHAUSTED
    assert ladder.next("suspect", (), 5.0)[1]["id"] == "a"


steps = st.lists(
    st.builds(
        lambda tries, budget, cooldown, window, when, even: {
            "budget": budget,
            "window_s": window,
            "cooldown_s": cooldown,
            "tries": tries,
            "when": when,
            "even_behind_gateway": even,
        },
        st.integers(1, 3),
        st.integers(1, 4),
        st.sampled_from([0.0, 2.0, 20.0]),
        st.sampled_from([5.0, 50.0, 5000.0]),
        st.sampled_from(["suspect", "degraded", "offline"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
).map(lambda found: [step(str(n), **one) for n, one in enumerate(found)])
moves = st.lists(
    st.tuples(
        st.sampled_from(["good", "bad", "answer", "kill", "miss", "blind", "look", "look"]),
        st.sampled_from(["suspect", "offline", "degraded", "unable", "ok"]),
        st.floats(0.0, 30.0),
        st.booleans(),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(steps, moves)
def test_no_history_breaks_a_budget_a_cooldown_or_the_order(
    made: list[dict[str, Any]], history: list[tuple[str, str, float, bool]]
) -> None:
    """Whatever happens, with the process killed anywhere: budgets, cool-downs and tries hold, one step runs at a time,
    only steps meant for a dead gateway are taken behind one, and a saved attempt is never forgotten or repeated as if
    it were new."""
    ladder, now = Ladder(made), 0.0
    taken: dict[str, list[float]] = {one["id"]: [] for one in made}
    tries: dict[tuple[str, int], int] = {}
    for what, state, passed, behind in history:
        now += passed
        current = ladder.current
        if what == "kill":
            was = json.loads(json.dumps(ladder.dump(now)))
            ladder = Ladder(made)
            ladder.restore(was, passed, now + passed)
            now += passed
            assert ladder.current is None or ladder.current["outcome"] == words.VERIFYING
        elif what in ("good", "bad") and current and current["outcome"] == words.RUNNING:
            ladder.ended(what == "good", what, now)
        elif what == "answer":
            ladder.answered(now)
        elif what in ("miss", "blind"):
            ladder.missed(asked=what == "miss")
        decision, found, at, _why = ladder.next(state, (), now, behind=behind)
        assert at is None or at > now
        if decision == words.EXHAUSTED:
            assert state in ("offline", "degraded")
            assert ladder.current is None
        if found is None:
            continue
        assert decision == words.TAKE
        assert state not in ("ok", "unable")
        assert state == found["when"] or (state == "offline" and found["when"] == "suspect")
        assert found["even_behind_gateway"] or not behind
        assert ladder.current is None
        times = taken[found["id"]]
        # ages are saved in milliseconds
        slack = 0.01 * (len(history) + 1)
        assert not times or now - times[-1] >= found["cooldown_s"] - slack
        recent = [t for t in times if now - t < found["window_s"] - slack]
        assert len(recent) < found["budget"]
        key = (found["id"], ladder.episode)
        tries[key] = tries.get(key, 0) + 1
        assert tries[key] <= found["tries"]
        ladder.begin_attempt(found, now)
        times.append(now)
        assert len(ladder.attempts) <= words.MAX_ATTEMPTS + 9


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    )
)
def test_strange_state_is_refused_in_one_of_three_ways(kept: Any) -> None:
    """State that no run of ours wrote raises ValueError, KeyError or TypeError, and nothing else."""
    with pytest.raises((ValueError, KeyError, TypeError)):
        Ladder([step()]).restore(kept, 0.0, 0.0)


def test_standing_follows_the_last_contact() -> None:
    """Without an acceptance the agent may not act. After one it may, for a while without asking; then it must ask; if
    there is no answer it may until `alone_s` is over; after a 409 it may not until the next 200; after a 410 never
    again."""
    standing = ActAuthority(fresh_s=4.0, alone_s=100.0)
    assert standing.why_not(0.0) == "not accepted yet"
    standing.report_answered(None, 0.0)
    assert standing.why_not(0.0) == "not accepted yet"
    standing.report_answered(200, 1.0)
    assert standing.why_not(5.0) == ""
    assert standing.why_not(5.1) == ASK
    standing.report_answered(503, 6.0)
    assert standing.why_not(100.0) == ""
    assert "no answer of the control plane" in standing.why_not(101.1)
    standing.report_answered(409, 7.0)
    assert "409" in standing.why_not(7.0)
    standing.report_answered(200, 8.0)
    assert standing.why_not(8.0) == ""
    standing.report_answered(410, 9.0)
    standing.report_answered(200, 9.5)
    assert standing.why_not(9.5) == "refused"


@given(
    st.lists(
        st.tuples(st.sampled_from([200, 410, 409, 403, 503, 429, None]), st.floats(0.01, 50.0))
    )
)
def test_s3_no_step_without_an_acceptance_that_stands(
    heard: list[tuple[int | None, float]],
) -> None:
    """Whatever the answers: an agent that may act was accepted at most `alone_s` ago, and no rejection came since."""
    standing, now, accepted, against = ActAuthority(4.0, 60.0), 0.0, None, True
    for count, (status, passed) in enumerate(heard, 1):
        now += passed
        standing.report_answered(status, now)
        if status == 200:
            accepted, against = now, False
        elif status in (409, 410, 403):
            against = True
        if standing.why_not(now) == "":
            assert accepted is not None
            assert not against
            assert now - accepted <= 60.0
            assert 410 not in [one for one, _ in heard[:count]]


def test_a_version_on_trial_does_not_act() -> None:
    """An accepted agent may not act while the answers forbid it, also when no answer comes any more and after a
    restart in place; the next answer that does not forbid it ends that."""
    standing = ActAuthority(4.0, 60.0)
    standing.report_answered(200, 1.0, held=True)
    assert standing.why_not(1.0) == "its version is on trial in a roll-out"
    standing.report_answered(None, 2.0)
    assert standing.why_not(20.0) == "its version is on trial in a roll-out"
    again = ActAuthority(4.0, 60.0)
    again.restore(standing.dump(3, "i", 20.0), 3, "i", 20.0)
    assert again.why_not(20.0) == "its version is on trial in a roll-out"
    standing.report_answered(200, 21.0)
    assert standing.why_not(21.0) == ""


@pytest.mark.parametrize(
    ("body", "held"),
    [
        (b'{"accepted": true, "hold_repairs": true}', True),
        (b'{"accepted": true, "hold_repairs": false}', False),
        (b'{"accepted": true, "hold_repairs": 1}', False),
        (b'{"accepted": true}', False),
        (b"", False),
        (b'"hold_repairs"', False),
        (b'["hold_repairs"]', False),
    ],
)
def test_what_forbids_repairs(body: bytes, held: bool) -> None:
    """Only `true` does; any other answer permits them, as older control planes do."""
    assert holds_repairs(body) is held


def test_standing_is_of_one_run() -> None:
    """A restart in place keeps the acceptance; another instance or epoch must be accepted itself."""
    standing = ActAuthority(4.0, 60.0)
    standing.report_answered(200, 10.0)
    kept = standing.dump(3, "i", 12.0)
    same, other, next_one = (ActAuthority(4.0, 60.0) for _ in range(3))
    same.restore(kept, 3, "i", 100.0)
    other.restore(kept, 3, "j", 100.0)
    next_one.restore(kept, 4, "i", 100.0)
    assert same.why_not(102.0) == ""
    assert other.why_not(102.0) == next_one.why_not(102.0) == "not accepted yet"
