"""Verdicts: S6 and the difference between our problem and the device's."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core.verdict import Evidence, judge
from nomad_watchdog.model import (
    AgentState,
    Epoch,
    Health,
    Limits,
    Monotonic,
    PlacementState,
    Report,
    VerdictState,
)
from tests.core.world import placement, record

LIMITS = Limits(startup_grace_s=60.0, report_stale_s=45.0)


def report(**changes: object) -> Report:
    base: dict = {
        "epoch": Epoch(1),
        "instance": "i",
        "ready": True,
        "state": AgentState.OK,
        "was_ready": True,
        "misses": 0,
        "confirmed": False,
        "reason": "",
        "version": "1",
        "address": "",
        "received_at": Monotonic(100.0),
    }
    return Report(**{**base, **changes})


reports = st.none() | st.builds(
    report,
    ready=st.booleans(),
    state=st.sampled_from(AgentState),
    was_ready=st.booleans(),
    misses=st.integers(0, 5),
    confirmed=st.booleans(),
    received_at=st.floats(0, 200).map(Monotonic),
    stopping=st.booleans(),
)
evidence = st.builds(
    Evidence,
    placement=st.none() | st.sampled_from(list(PlacementState)).map(lambda s: placement("a", 1, s)),
    report=reports,
    health=st.none() | st.builds(Health, status=st.sampled_from(["passing", "critical"])),
    waiting_since=st.floats(0, 200).map(Monotonic),
    leaving=st.booleans(),
    obstacle=st.sampled_from(["", "no node has room"]),
)


@settings(max_examples=500, deadline=None)
@given(evidence)
def test_s6_offline_needs_the_whole_evidence(seen: Evidence) -> None:
    """Offline only with a fresh report of a ready agent whose device answered once, then missed
    probes, then failed an independent confirmation."""
    verdict = judge(record("a", epoch=1), seen, LIMITS, Monotonic(200.0))

    if verdict.state is VerdictState.OFFLINE:
        told = seen.report
        assert told is not None
        assert told.ready
        assert told.was_ready
        assert told.misses > 0
        assert told.confirmed
        assert 200.0 - told.received_at <= LIMITS.report_stale_s
        assert seen.placement is not None


@settings(max_examples=300, deadline=None)
@given(evidence, st.floats(0, 10_000))
def test_s6_a_slow_start_is_never_offline(seen: Evidence, waited: float) -> None:
    """Without a report there is no offline, however long the start takes."""
    quiet = Evidence(seen.placement, None, seen.health, Monotonic(0.0), seen.leaving, seen.obstacle)

    verdict = judge(record("a", epoch=1), quiet, LIMITS, Monotonic(waited))

    assert verdict.state not in (VerdictState.OFFLINE, VerdictState.SUSPECT)
    assert verdict.reason


def test_starting_turns_into_unwatched_after_the_grace() -> None:
    """No agent: starting at 60 s, unwatched at 61 s; the words change with it."""
    nothing = Evidence(None, None, None, Monotonic(0.0))
    rec = record("a")

    assert judge(rec, nothing, LIMITS, Monotonic(60.0)).state is VerdictState.STARTING
    assert judge(rec, nothing, LIMITS, Monotonic(61.0)).state is VerdictState.UNWATCHED


def test_a_silent_agent_that_passes_in_consul_is_watched() -> None:
    """After a restart of ours the agents' own checks stand in for reports not heard yet."""
    seen = Evidence(placement("a", 1), None, Health("passing", Epoch(1)), Monotonic(0.0))

    assert judge(record("a", epoch=1), seen, LIMITS, Monotonic(500.0)).state is VerdictState.WATCHED


def test_a_lost_node_is_our_problem() -> None:
    """A node that does not answer leaves the device unwatched, whatever was reported before."""
    seen = Evidence(
        placement("a", 1, PlacementState.LOST), report(state=AgentState.OK), None, Monotonic(0.0)
    )

    assert (
        judge(record("a", epoch=1), seen, LIMITS, Monotonic(101.0)).state is VerdictState.UNWATCHED
    )


def test_an_unconfirmed_claim_is_a_suspicion() -> None:
    """An agent that says offline without a confirmation, or never had an answer, is not believed."""
    for told in (
        report(state=AgentState.OFFLINE, misses=3, confirmed=False),
        report(state=AgentState.OFFLINE, misses=3, confirmed=True, was_ready=False),
    ):
        seen = Evidence(placement("a", 1), told, None, Monotonic(0.0))
        verdict = judge(record("a", epoch=1), seen, LIMITS, Monotonic(101.0))

        assert verdict.state is VerdictState.SUSPECT
