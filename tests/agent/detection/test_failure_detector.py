"""The failure detector of a device, as a unit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent.detection.failure_detector import FailureDetector

NAMES = ("0:http:80", "1:tcp:22")
STATES = ("ok", "suspect", "degraded", "offline", "unable")
outcomes = st.sampled_from([True, False, False, None])
events = st.lists(
    st.one_of(
        st.tuples(st.just("probe"), st.sampled_from(NAMES), outcomes),
        st.tuples(st.just("confirm"), st.just("icmp"), outcomes),
    ),
    max_size=60,
)
History = list[tuple[str, str, Any]]


def play(history: History, need: int, *, was_ready: bool) -> FailureDetector:
    """The detector after these events."""
    it = FailureDetector(need, was_ready=was_ready)
    for kind, name, outcome in history:
        if kind == "probe":
            it.probed(name, outcome, "r")
        else:
            it.confirmation(name, outcome, "r")
    return it


def dead(need: int = 1) -> FailureDetector:
    """A detector whose device is offline."""
    it = FailureDetector(need, was_ready=True)
    while it.state != "offline":
        it.probed("0:p", False, "no answer")
        it.confirmation("icmp", False, "no echo")
    return it


@given(events, st.integers(1, 5), st.booleans())
def test_offline_has_all_three_reasons(history: History, need: int, known: bool) -> None:
    """Offline requires at least one earlier answer, `need` consecutive misses while no probe answers, and two failed
    confirmations with a miss between them and no answer since (S6)."""
    it = FailureDetector(need, was_ready=known)
    answered, failed_at = known, set()
    row: dict[str, int] = {}
    for kind, name, ok in history:
        before, wanted = it.state, it.wants_confirmation()
        if kind == "probe":
            if ok is not None:
                row[name] = 0 if ok else row.get(name, 0) + 1
            answered = answered or ok is True
            changed = it.probed(name, ok, "r")
            if ok:
                failed_at = set()
        else:
            if wanted:
                failed_at = set() if ok else failed_at
                failed_at |= {it.misses} if ok is False else set()
            changed = it.confirmation(name, ok, "r")
        assert changed == (it.state != before)
        assert it.state in STATES
        assert it.misses == max(row.values(), default=0)
        assert it.was_ready == answered
        assert it.confirmed == (it.state == "offline")
        if it.state == "offline":
            assert answered
            assert len(failed_at) >= 2
            assert all(row.values())
            assert max(row.values()) >= need
        if max(row.values(), default=0) >= need:
            assert it.state != "ok"


@given(events, st.integers(1, 5), st.booleans())
def test_what_could_not_be_asked_never_makes_offline(
    history: History, need: int, known: bool
) -> None:
    """A history that ends offline also does so without its unable results, and with as many misses: unable is no miss,
    no answer and no confirmation."""
    it = play(history, need, was_ready=known)
    asked = [event for event in history if event[2] is not None]
    without = play(asked, need, was_ready=known)
    assert it.misses == without.misses
    if it.state == "offline":
        assert without.state == "offline"
    if without.state != "offline":
        assert it.state != "offline"


@given(st.lists(st.sampled_from(NAMES)), st.integers(1, 5), st.booleans())
def test_a_probe_that_is_never_asked_becomes_unable_after_as_many_rounds(
    names: list[str], need: int, known: bool
) -> None:
    """If only the resolver fails, the state becomes unable once one probe could not be sent `need` times, is never ok
    before that for a device that has not answered this agent, and no miss is counted."""
    it = FailureDetector(need, was_ready=known)
    for number, name in enumerate(names, 1):
        it.probed(name, None, "can't resolve its name")
        persisted = any(names[:number].count(one) >= need for one in NAMES)
        assert it.state == ("unable" if persisted else "suspect")
        assert it.misses == 0
        assert not it.wants_confirmation()
        assert "can't resolve its name" in it.reason


rounds = st.lists(
    st.tuples(
        st.sampled_from(["alive", "dead", "unable"]),
        st.sampled_from(["none", "alive", "dead", "unable"]),
    ),
    min_size=FailureDetector.MAX_ROUNDS,
    max_size=40,
)


@given(rounds, st.integers(1, 5))
def test_suspect_is_left_within_the_bound(history: list[tuple[str, str]], need: int) -> None:
    """A device that has answered does not stay suspect throughout MAX_ROUNDS missed rounds, whatever its confirmation
    and its gateway do in each."""
    it = FailureDetector(need, was_ready=True)
    for _ in range(need - 1):
        it.probed("0:p", False, "r")
    in_a_row = 0
    value = {"alive": True, "dead": False, "unable": None}
    for confirmation, gateway in history:
        it.probed("0:p", False, "r")
        if gateway == "none":
            it.confirmation("icmp", value[confirmation], "r")
        else:
            it.gateway(value[gateway], "gateway g does not answer")
            if gateway == "alive":
                it.confirmation("icmp", value[confirmation], "r")
        in_a_row = in_a_row + 1 if it.state == "suspect" else 0
        assert in_a_row < FailureDetector.MAX_ROUNDS, it.reason
        assert it.state != "ok"


def test_one_failed_confirmation_is_asked_again_after_the_next_miss() -> None:
    """The first failed confirmation leaves the device suspect, a second one is not requested without a miss in between,
    and a confirmation that succeeds makes it degraded and resets the count."""
    it = FailureDetector(2, was_ready=True)
    it.probed("p", False, "r")
    it.probed("p", False, "r")
    assert it.wants_confirmation()
    assert not it.confirmation("icmp", False, "no echo")
    assert it.state == "suspect"
    assert not it.wants_confirmation()
    it.probed("p", False, "r")
    assert it.confirmation("icmp", True, "echo")
    assert it.state == "degraded"
    it.probed("p", False, "r")
    assert not it.confirmation("icmp", False, "no echo")
    assert it.state == "degraded"
    it.probed("p", False, "r")
    assert it.confirmation("icmp", False, "no echo")
    assert (it.state, it.confirmed) == ("offline", True)


def test_a_dead_service_on_a_live_host_is_degraded_at_the_first_confirmation() -> None:
    """If the web service dies and the host answers pings, the device is degraded with both in the reason, and ok when
    the service answers."""
    it = FailureDetector(3, was_ready=True)
    for _ in range(3):
        it.probed("0:http:80", False, "http:80: connection refused")
    assert it.state == "suspect"
    assert it.confirmation("icmp", True, "echo")
    assert it.state == "degraded"
    assert it.reason == "http:80: connection refused; but icmp answers"
    assert it.probed("0:http:80", True, "status 200")
    assert (it.state, it.reason) == ("ok", "status 200")


def test_another_probe_that_answers_makes_degraded_too() -> None:
    """If one of two probes misses and the other answers, the device is degraded without a confirmation, and never
    offline."""
    it = FailureDetector(2, was_ready=True)
    for _ in range(2):
        it.probed("0:http:80", False, "r")
        it.probed("1:tcp:22", True, "connected")
    assert (it.state, it.reason) == ("degraded", "r; but tcp:22 answers")
    assert not it.wants_confirmation()


def test_an_offline_device_whose_confirmation_answers_again_is_degraded() -> None:
    """If the host comes back without its service, the device is no longer offline, and degraded at the next miss."""
    it = dead()
    it.probed("0:p", False, "no answer")
    assert it.confirmation("icmp", True, "echo")
    assert (it.state, it.to_ask) == ("suspect", {"0:p"})
    assert it.probed("0:p", False, "connection refused", asked_at=it.returns)
    assert (it.state, it.reason) == ("degraded", "connection refused; but icmp answers")


@pytest.mark.parametrize("overtaken", [0, 1, 3])
@pytest.mark.parametrize("by", ["confirmation", "probe"])
def test_a_device_that_comes_back_whole_is_never_degraded(by: str, overtaken: int) -> None:
    """When part of an offline device answers, misses of probes sent before that do not make it degraded, and it is ok
    when the probes sent afterwards succeed."""
    it = FailureDetector(2, was_ready=True)
    while it.state != "offline":
        for name in NAMES:
            it.probed(name, False, "no answer")
        it.confirmation("icmp", False, "no echo")
    before = it.returns
    if by == "confirmation":
        it.probed(NAMES[0], False, "no answer")
        assert it.confirmation("icmp", True, "echo")
    else:
        assert it.probed(NAMES[1], True, "connected")
    for _ in range(overtaken):
        assert not it.probed(NAMES[0], False, "no answer", asked_at=before)
        assert it.state == "suspect"
    for name in NAMES:
        it.probed(name, True, "connected", asked_at=it.returns)
    assert (it.state, it.misses, it.to_ask) == ("ok", 0, set())


def test_a_device_that_dies_again_while_it_comes_back_is_offline_by_two_confirmations() -> None:
    """If it answers one ping and nothing after that, the next miss confirms the partial return, and offline takes the
    usual number of failed confirmations. Until a probe could be sent again it stays suspect."""
    it = dead()
    it.probed("0:p", False, "no answer")
    it.confirmation("icmp", True, "echo")
    before = it.returns - 1
    it.probed("0:p", False, "no answer", asked_at=before)
    assert not it.confirmation("icmp", False, "no echo")
    it.probed("0:p", False, "no answer", asked_at=before)
    assert it.confirmation("icmp", False, "no echo")
    assert (it.state, it.to_ask) == ("offline", set())


def test_a_reason_has_no_count_and_its_cause_changes_with_the_cause_only() -> None:
    """The reason stays the same however long the state lasts; another cause changes it, a measured value does not."""
    it = FailureDetector(2, was_ready=True)
    for _ in range(2):
        it.probed("0:tls", False, "tls: no answer")
    it.confirmation("icmp", True, "echo")
    cause = it.cause
    for _ in range(90):
        assert not it.probed("0:tls", False, "tls: no answer")
        assert (it.reason, it.cause) == ("tls: no answer; but icmp answers", cause)
    assert it.misses == 92
    it.probed("0:tls", False, "tls: status 503")
    assert (it.reason, it.cause) != (cause, cause)
    it.probed("0:tls", True, "r", warning="tls: took 0.5 s")
    slow = it.cause
    it.probed("0:tls", True, "r", warning="tls: took 0.6 s")
    assert (it.state, it.reason, it.cause) == ("degraded", "tls: took 0.6 s", slow)
    it.probed("0:tls", True, "r")
    assert (it.state, it.cause) == ("ok", "")


@pytest.mark.parametrize("first", NAMES)
def test_a_degraded_device_stays_degraded_with_its_new_agent(first: str) -> None:
    """If one of two probes is dead, one miss of it is enough after a restart, whichever is probed first. After the
    first success of both it is ok, and misses count as usual."""
    it = FailureDetector(3, was_ready=True)
    it.restore("degraded", "http:80: status 503; but tcp:22 answers", 50)
    second = next(name for name in NAMES if name != first)
    for name in (first, second, NAMES[1]):
        it.probed(name, name == NAMES[1], "http:80: status 503")
    assert (it.state, it.reason) == ("degraded", "http:80: status 503; but tcp:22 answers")
    it.probed(NAMES[0], True, "status 200")
    it.probed(NAMES[0], False, "http:80: status 503")
    assert it.state == "ok"


def test_a_confirmation_that_cannot_be_asked_leads_to_unable_and_a_failed_one_on() -> None:
    """Two confirmations that could not be made lead to unable with the reason. Earlier counts neither increase nor get
    lost."""
    it = FailureDetector(1, was_ready=True)
    for _ in range(2):
        it.probed("0:p", False, "no answer")
        it.confirmation("icmp", None, "network is unreachable")
    assert it.state == "unable"
    assert it.reason.endswith("unable to confirm: icmp: network is unreachable")
    for _ in range(2):
        assert it.state == "unable"
        it.probed("0:p", False, "no answer")
        it.confirmation("icmp", False, "no echo")
    assert it.state == "offline"


def test_an_offline_device_that_cannot_be_asked_is_unable_and_is_confirmed_anew() -> None:
    """If the name of a dead device no longer resolves, the state is unable. The device may have come back meanwhile,
    and one missed probe is no evidence: two more confirmations are needed."""
    it = dead(2)
    it.probed("0:p", None, "can't resolve its name")
    assert it.state == "offline"
    assert it.probed("0:p", None, "can't resolve its name")
    assert (it.state, it.confirmed) == ("unable", False)
    assert it.probed("0:p", False, "no answer")
    assert it.state == "suspect"
    assert not it.confirmation("icmp", False, "no echo")
    it.probed("0:p", False, "no answer")
    assert it.confirmation("icmp", False, "no echo")
    assert it.state == "offline"
    it.probed("0:p", None, "can't resolve its name")
    it.probed("0:p", True, "connected")
    assert it.state == "ok"


def test_misses_and_failures_to_ask_mixed_count_the_misses_alone() -> None:
    """If every second round is unable, the device is suspect after `need` misses, and never unable before."""
    it = FailureDetector(3, was_ready=True)
    it.probed("0:p", True, "connected")
    for number in range(1, 4):
        it.probed("0:p", None, "too many open files")
        it.probed("0:p", False, "no answer")
        assert it.misses == number
        assert it.state == ("suspect" if number == 3 else "ok")


@pytest.mark.parametrize("answered", [False, True])
def test_one_of_two_probes_that_cannot_be_asked_does_not_count(answered: bool) -> None:
    """If one probe answers and the other is unable, the state is unable, as half of the device is not watched. When the
    first misses, the other's last answer keeps it unable, never offline; a probe that never ran does not."""
    it = FailureDetector(2, was_ready=True)
    if answered:
        it.probed(NAMES[1], True, "connected")
    for _ in range(2):
        it.probed(NAMES[0], True, "status 200")
        it.probed(NAMES[1], None, "password_file: permission denied")
    assert it.state == "unable"
    assert "password_file" in it.reason
    for _ in range(4):
        it.probed(NAMES[0], False, "no answer")
        it.probed(NAMES[1], None, "password_file: permission denied")
        it.confirmation("icmp", False, "no echo")
    assert it.state == ("unable" if answered else "offline")


def test_a_device_that_never_answered_is_degraded_or_suspect_and_never_offline() -> None:
    """Its confirmation runs like any other's: an answer makes the device degraded, a failure leaves it suspect."""
    it = FailureDetector(2)
    it.probed("0:p", False, "no answer")
    assert it.state == "suspect"
    for _ in range(5):
        it.probed("0:p", False, "no answer")
        it.confirmation("icmp", False, "no echo")
    assert (it.state, it.was_ready) == ("suspect", False)
    assert it.reason.endswith("it has never answered")
    it.probed("0:p", False, "no answer")
    it.confirmation("icmp", True, "echo")
    assert it.state == "degraded"


@given(st.lists(st.tuples(outcomes, st.booleans()), max_size=40), st.integers(1, 5))
def test_a_warning_is_degraded_and_never_a_miss(history: list, need: int) -> None:
    """A success that exceeds a threshold counts as a success everywhere; the device is degraded with the warning's
    text, and a single miss afterwards does not end that."""
    it, plain = FailureDetector(need, was_ready=True), FailureDetector(need, was_ready=True)
    for outcome, warned in history:
        it.probed("0:p", outcome, "r", warning="expires soon" if warned else "")
        plain.probed("0:p", outcome, "r")
        assert it.misses == plain.misses
        assert it.wants_confirmation() == plain.wants_confirmation()
        if it.state != plain.state:
            assert (plain.state, it.state, it.reason) == ("ok", "degraded", "expires soon")
        if outcome:
            assert it.state == ("degraded" if warned else "ok")


def test_a_doubted_belief_is_believed_again_after_two_more_failed_confirmations() -> None:
    """A doubt makes an offline device suspect at once; it is offline again after two more pairs of a miss and a failed
    confirmation. A doubt about an ok device changes nothing."""
    it = FailureDetector(1, was_ready=True)
    assert not it.doubt(confirmed_too=True)
    for _ in range(2):
        it.probed("p", False, "r")
        it.confirmation("icmp", False, "r")
    assert it.state == "offline"
    assert it.doubt(confirmed_too=True)
    for _ in range(2):
        assert (it.state, it.confirmed) == ("suspect", False)
        assert not it.confirmation("icmp", False, "r")
        it.probed("p", False, "r")
        it.confirmation("icmp", False, "r")
    assert (it.state, it.confirmed) == ("offline", True)


def test_a_doubt_takes_back_the_rounds_and_not_what_was_confirmed_before() -> None:
    """After a doubt a suspect device needs two more rounds, each after a miss of its own; an offline one whose
    confirmation is not in doubt stays offline."""
    it = FailureDetector(1, was_ready=True)
    it.probed("p", False, "r")
    it.confirmation("icmp", False, "r")
    it.probed("p", False, "r")
    assert not it.doubt(confirmed_too=False)
    assert not it.wants_confirmation()
    it.probed("p", False, "r")
    assert not it.confirmation("icmp", False, "r")
    it.probed("p", False, "r")
    assert it.confirmation("icmp", False, "r")
    assert not it.doubt(confirmed_too=False)
    assert (it.state, it.confirmed) == ("offline", True)


@given(events, st.integers(1, 5))
def test_a_success_changes_nothing_of_a_clean_belief(history: History, need: int) -> None:
    """With no misses and in state ok, another answer changes nothing (the benchmark of detection skips those)."""
    it = FailureDetector(need, was_ready=True)
    for _, name, _ok in history:
        it.probed(name, True, "r")
        before = (it.state, it.misses, dict(it._misses), it.wants_confirmation(), it.confirmed)
        it.probed(name, True, "r")
        assert before == (
            it.state,
            it.misses,
            dict(it._misses),
            it.wants_confirmation(),
            it.confirmed,
        )


@given(events, st.integers(1, 5))
def test_one_good_round_is_enough(history: History, need: int) -> None:
    """From any history, one success of every probe leads to ok with no misses."""
    it = play(history, need, was_ready=False)
    for name in NAMES:
        it.probed(name, True, "r")
    assert (it.state, it.misses, it.confirmed, it.was_ready) == ("ok", 0, False, True)


@given(
    st.sampled_from(["ok", "suspect", "degraded", "offline", "unable", "", None, 5, []]),
    st.sampled_from([None, 1, 7, -1, "3", True, 10**30]),
    st.booleans(),
)
def test_restored_state_is_never_worse_than_known(state: Any, misses: Any, known: bool) -> None:
    """Kept state counts only as far as the device had answered, and only known states are accepted."""
    it = FailureDetector(3, was_ready=known)
    it.restore(state, None, misses)
    assert it.state == (state if known and state in ("suspect", "degraded", "offline") else "ok")
    assert it.confirmed == (it.state == "offline")
    it.probed("p", True, "r")
    assert it.state == "ok"


@pytest.mark.parametrize("misses", [0, 4])
@pytest.mark.parametrize("state", ["degraded", "offline"])
def test_a_condition_is_adopted_and_ends_with_the_first_success(state: str, misses: int) -> None:
    """The predecessor's condition holds while this agent's probes miss, also below `need`, and a second one changes
    nothing; the first success ends it."""
    it = FailureDetector(3)
    it.probed("0:p", False, "no answer")
    assert it.adopt(state, "icmp: no echo, 4 times; tcp:80: no answer", misses)
    assert (it.state, it.was_ready) == (state, True)
    it.probed("0:p", False, "no answer")
    assert it.state == state
    it.probed("0:p", True, "connected")
    assert it.state == "ok"
    assert not it.adopt(state, "r", misses)
    assert it.state == "ok"


def test_an_adopted_outage_is_confirmed_or_refuted_by_this_agent() -> None:
    """Two failed confirmations of its own replace the evidence; one that succeeds makes it degraded, and after that no
    condition is adopted."""
    it = FailureDetector(3)
    it.probed("0:p", False, "no answer")
    it.adopt("offline", "tcp:80: refused, 9 times; icmp: old", 9)
    for _ in range(2):
        it.probed("0:p", False, "tcp:80: no answer")
        assert it.wants_confirmation()
        assert not it.confirmation("icmp", False, "no echo")
    assert (it.state, it.reason) == ("offline", "tcp:80: no answer; icmp: no echo")
    it.probed("0:p", False, "tcp:80: no answer")
    assert it.confirmation("icmp", True, "echo")
    it.probed("0:p", False, "tcp:80: no answer")
    assert it.state == "degraded"
    assert not it.adopt("offline", "r", 9)


def test_what_was_before_ends_with_the_first_answer_of_any_probe() -> None:
    """If one of two probes answers after a restart and the other has missed once, the earlier outage is over."""
    it = FailureDetector(3, was_ready=True)
    it.restore("offline", "r; icmp: no echo", 5)
    it.probed(NAMES[0], False, "no answer")
    assert (it.state, it.misses) == ("offline", 6)
    assert it.probed(NAMES[1], True, "connected")
    assert (it.state, it.misses) == ("ok", 1)
