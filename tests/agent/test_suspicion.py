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
    """Offline follows only an answer some time, `need` misses in a row while no probe answers, and a failed
    confirmation (S6)."""
    it = Suspicion(need, was_ready=known)
    answered, confirmed = known, False
    row: dict[str, int] = {}
    for kind, name, ok in history:
        before = it.state
        if kind == "probe":
            row[name] = 0 if ok else row.get(name, 0) + 1
            answered = answered or ok
            changed = it.probed(name, ok, "r")
            if it.state == "ok":
                confirmed = False
        else:
            changed = it.confirmation(name, ok, "r")
            confirmed = confirmed or (before == "suspect" and not ok)
        assert changed == (it.state != before)
        assert it.state in ("ok", "suspect", "offline")
        assert it.misses == max(row.values(), default=0)
        assert it.was_ready == answered
        if it.state == "offline":
            assert answered
            assert confirmed
            assert it.confirmed
            assert all(row.values())
            assert before == "offline" or max(row.values(), default=0) >= need
        if max(row.values(), default=0) >= need:
            assert it.state != "ok"
        else:
            assert it.state == "ok"


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
