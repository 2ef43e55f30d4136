"""Verdicts: S6 and the difference between our problem and the device's."""

from __future__ import annotations

from dataclasses import replace

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
    placed_at=st.none() | st.floats(0, 200).map(Monotonic),
    beat_at=st.none() | st.floats(0, 200).map(Monotonic),
    grace_s=st.none() | st.floats(1, 900),
)


@settings(max_examples=500, deadline=None)
@given(evidence)
def test_s6_offline_needs_the_whole_evidence(seen: Evidence) -> None:
    """Offline only with a fresh report of a ready agent whose device answered once, then missed
    probes, then failed an independent confirmation, and has sent us no sign of life since."""
    verdict = judge(record("a", epoch=1), seen, LIMITS, Monotonic(200.0))

    if verdict.state is VerdictState.OFFLINE:
        told = seen.report
        assert told is not None
        assert told.ready
        assert told.was_ready
        assert told.misses > 0
        assert told.confirmed
        assert 200.0 - told.received_at <= LIMITS.report_stale_s
        assert not told.stopping
        assert seen.placement is not None
        assert seen.placement.state is not PlacementState.LOST
        assert seen.beat_at is None or 200.0 - seen.beat_at > LIMITS.heartbeat_fresh_s


@settings(max_examples=500, deadline=None)
@given(evidence)
def test_s6_a_critical_agent_is_no_evidence_against_its_device(seen: Evidence) -> None:
    """Consul's «critical» changes no verdict: it is as if Consul had said nothing."""
    critical = replace(seen, health=Health("critical", Epoch(1)))
    silent = replace(seen, health=None)

    now = Monotonic(200.0)
    rec = record("a", epoch=1)
    assert judge(rec, critical, LIMITS, now) == judge(rec, silent, LIMITS, now)


@settings(max_examples=500, deadline=None)
@given(evidence)
def test_s6_a_device_that_has_just_beaten_is_not_offline(seen: Evidence) -> None:
    """A fresh sign of life turns offline into suspect, and changes no other verdict."""
    now, rec = Monotonic(200.0), record("a", epoch=1)
    without = judge(rec, replace(seen, beat_at=None), LIMITS, now)
    beaten = judge(rec, replace(seen, beat_at=Monotonic(190.0)), LIMITS, now)

    if without.state is VerdictState.OFFLINE:
        assert beaten.state is VerdictState.SUSPECT
        assert "sign of life 10 s ago" in beaten.reason
    else:
        assert beaten == without


def test_the_measured_grace_counts_from_the_dispatch() -> None:
    """With a grace of 20 s, a start dispatched at 100 s is starting at 120 s and unwatched at 121 s,
    and never offline."""
    seen = Evidence(
        placement("a", 1),
        None,
        None,
        Monotonic(90.0),
        placed_at=Monotonic(100.0),
        grace_s=20.0,
    )
    rec = record("a", epoch=1)

    assert judge(rec, seen, LIMITS, Monotonic(120.0)).state is VerdictState.STARTING
    assert judge(rec, seen, LIMITS, Monotonic(121.0)).state is VerdictState.UNWATCHED


def test_what_is_no_measured_start_keeps_the_setting() -> None:
    """A restart in place, whose dispatch was long ago, has the 60 s of the setting, not the 20 s of a
    start."""
    seen = Evidence(
        placement("a", 1),
        None,
        None,
        Monotonic(100.0),
        placed_at=Monotonic(10.0),
        grace_s=20.0,
    )

    assert (
        judge(record("a", epoch=1), seen, LIMITS, Monotonic(160.0)).state is VerdictState.STARTING
    )


def test_starting_again_and_again_is_not_starting_for_ever() -> None:
    """An agent dispatched a second ago, for the tenth time in 10 minutes, leaves its device unwatched."""
    seen = Evidence(
        placement("a", 1),
        None,
        None,
        Monotonic(0.0),
        placed_at=Monotonic(599.0),
        grace_s=20.0,
    )

    assert (
        judge(record("a", epoch=1), seen, LIMITS, Monotonic(600.0)).state is VerdictState.UNWATCHED
    )


@settings(max_examples=300, deadline=None)
@given(evidence, st.floats(0, 10_000))
def test_s6_a_slow_start_is_never_offline(seen: Evidence, waited: float) -> None:
    """Without a report there is no offline, however long the start takes."""
    quiet = replace(seen, report=None, waiting_since=Monotonic(0.0))

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


def test_a_silent_agent_that_its_scheduler_finds_ready_is_watched() -> None:
    """Where there is no Consul, the pod's own readiness stands in for reports not heard yet; an agent that
    is not ready, or is asked by nobody, is what it was without."""
    up = placement("a", 1)
    states = {}
    for ready in (True, False, None):
        seen = Evidence(replace(up, ready=ready), None, None, Monotonic(0.0))
        states[ready] = judge(record("a", epoch=1), seen, LIMITS, Monotonic(500.0)).state

    assert states == {
        True: VerdictState.WATCHED,
        False: VerdictState.UNWATCHED,
        None: VerdictState.UNWATCHED,
    }


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
