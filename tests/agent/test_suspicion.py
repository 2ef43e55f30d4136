"""The belief about a device, by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent.suspicion import Suspicion

NAMES = ("0:http:80", "1:tcp:22")
events = st.lists(
    st.one_of(
        st.tuples(st.just("probe"), st.sampled_from(NAMES), st.booleans()),
        st.tuples(st.just("confirm"), st.just("icmp"), st.booleans()),
    ),
    max_size=60,
)


@given(events, st.integers(1, 5), st.booleans())
def test_offline_has_all_three_reasons(history: list, need: int, known: bool) -> None:
    """Offline follows only an answer some time, `need` misses in a row while no probe answers, and two
    failed confirmations with a miss between them (S6)."""
    it = Suspicion(need, was_ready=known)
    answered, failed_at = known, set()
    row: dict[str, int] = {}
    for kind, name, ok in history:
        before = it.state
        if kind == "probe":
            row[name] = 0 if ok else row.get(name, 0) + 1
            answered = answered or ok
            changed = it.probed(name, ok, "r")
            if ok:
                failed_at = set()
        else:
            if before == "suspect":
                failed_at = set() if ok and it.wants_confirmation() else failed_at
                failed_at |= set() if ok else {it.misses}
            changed = it.confirmation(name, ok, "r")
        assert changed == (it.state != before)
        assert it.state in ("ok", "suspect", "offline")
        assert it.misses == max(row.values(), default=0)
        assert it.was_ready == answered
        if it.state == "offline":
            assert answered
            assert len(failed_at) >= 2
            assert it.confirmed
            assert all(row.values())
            assert before == "offline" or max(row.values(), default=0) >= need
        if max(row.values(), default=0) >= need:
            assert it.state != "ok"
        else:
            assert it.state == "ok"


def test_one_failed_confirmation_is_asked_again_after_the_next_miss() -> None:
    """The first failed confirmation leaves the device suspect, a second one without a miss between is
    not asked for, and a confirmation that succeeds begins the count anew."""
    it = Suspicion(2, was_ready=True)
    it.probed("p", False, "r")
    it.probed("p", False, "r")
    assert it.wants_confirmation()
    assert not it.confirmation("icmp", False, "no echo")
    assert not it.wants_confirmation()
    it.probed("p", False, "r")
    it.confirmation("icmp", True, "echo")
    it.probed("p", False, "r")
    assert not it.confirmation("icmp", False, "no echo")
    assert it.state == "suspect"
    it.probed("p", False, "r")
    assert it.confirmation("icmp", False, "no echo")
    assert (it.state, it.confirmed) == ("offline", True)


def test_a_doubted_belief_is_believed_again_after_two_more_failed_confirmations() -> None:
    """A doubt makes an offline device suspect at once; it is offline again after another miss, a failed
    confirmation, another miss and another one. Doubting what is ok changes nothing."""
    it = Suspicion(1, was_ready=True)
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
    """After a doubt a suspected device needs two more rounds, each after a miss of its own; an offline one
    that is not to be doubted stays offline."""
    it = Suspicion(1, was_ready=True)
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
def test_a_success_changes_nothing_of_a_clean_belief(history: list, need: int) -> None:
    """With no misses and in state ok, one more answer leaves everything as it is (the benchmark of
    detection steps over those)."""
    it = Suspicion(need, was_ready=True)
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
def test_one_good_round_is_enough(history: list, need: int) -> None:
    """From any past, one success of every probe leads to ok with no misses."""
    it = Suspicion(need)
    for kind, name, ok in history:
        if kind == "probe":
            it.probed(name, ok, "r")
        else:
            it.confirmation(name, ok, "r")
    for name in NAMES:
        it.probed(name, True, "r")
    assert (it.state, it.misses, it.confirmed, it.was_ready) == ("ok", 0, False, True)


@given(st.sampled_from(["ok", "suspect", "offline", "repairing", "", None, 5, []]), st.booleans())
def test_restored_state_is_never_worse_than_known(state: object, known: bool) -> None:
    """What a file says is believed only as far as the device had answered, and only known words."""
    it = Suspicion(3, was_ready=known)
    it.restore(state, None)
    assert it.state == (state if known and state in ("suspect", "offline") else "ok")
    assert it.confirmed == (it.state == "offline")
    it.probed("p", True, "r")
    assert it.state == "ok"
