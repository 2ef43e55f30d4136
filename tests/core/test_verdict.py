"""Verdicts: S6, and the difference between our problem and the device's."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core.verdict import CARRIED, Evidence, judge
from nomad_watchdog.ids import DeviceId, Slug
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
        "device_id": DeviceId("d"),
        "slug": Slug("d"),
        "epoch": Epoch(1),
        "instance": "i",
        "sequence": 0,
        "ready": True,
        "state": AgentState.OK,
        "was_ready": True,
        "misses": 0,
        "confirmed": False,
        "reason": "",
        "version": "1",
        "listen": "",
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
    state_age_s=st.floats(0, 1_000),
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
    quiet_since=st.floats(0, 200).map(Monotonic),
    suspect_since=st.none() | st.floats(0, 200).map(Monotonic),
    refusal=st.sampled_from(["", "HTTP 401"]),
    before=st.none() | st.sampled_from(CARRIED),
)


@settings(max_examples=300, deadline=None)
@given(evidence)
def test_s6_offline_needs_the_whole_evidence(seen: Evidence) -> None:
    """Offline requires a fresh report of a ready agent whose device answered once, then missed probes, then failed an
    independent confirmation, and has sent no heartbeat since."""
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


@settings(max_examples=300, deadline=None)
@given(evidence)
def test_s6_a_critical_agent_is_no_evidence_against_its_device(seen: Evidence) -> None:
    """A critical check in Consul changes no verdict: it counts like no check."""
    critical = replace(seen, health=Health("critical", Epoch(1)))
    silent = replace(seen, health=None)

    now = Monotonic(200.0)
    rec = record("a", epoch=1)
    assert judge(rec, critical, LIMITS, now) == judge(rec, silent, LIMITS, now)


@settings(max_examples=300, deadline=None)
@given(evidence)
def test_s6_a_device_that_has_just_beaten_is_not_offline(seen: Evidence) -> None:
    """A fresh heartbeat turns offline into suspect, or into degraded when that lasts, and changes no other verdict."""
    now, rec = Monotonic(200.0), record("a", epoch=1)
    without = judge(rec, replace(seen, beat_at=None), LIMITS, now)
    beaten = judge(rec, replace(seen, beat_at=Monotonic(190.0)), LIMITS, now)

    if without.state is VerdictState.OFFLINE:
        assert beaten.state in (VerdictState.SUSPECT, VerdictState.DEGRADED)
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
    """A restart in place, dispatched long ago, has the 60 s of the setting, not the 20 s of a start."""
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

    assert verdict.state is not VerdictState.OFFLINE
    # only if it was suspect before this control plane started, by a report of its agent
    assert verdict.state is not VerdictState.SUSPECT or seen.before is VerdictState.SUSPECT
    assert verdict.reason


def test_starting_turns_into_unwatched_after_the_grace() -> None:
    """Without an agent, the verdict is starting at 60 s and unwatched at 61 s; the reason changes with it."""
    nothing = Evidence(None, None, None, Monotonic(0.0))
    rec = record("a")

    assert judge(rec, nothing, LIMITS, Monotonic(60.0)).state is VerdictState.STARTING
    assert judge(rec, nothing, LIMITS, Monotonic(61.0)).state is VerdictState.UNWATCHED


def test_a_passing_check_bridges_report_stale_and_no_more() -> None:
    """After a restart of the control plane the agents' own checks replace missing reports for 45 s; then the device is
    unwatched, whatever the check's status, and the reason names what to check."""
    seen = Evidence(
        placement("a", 1),
        None,
        Health("passing", Epoch(1)),
        Monotonic(0.0),
        quiet_since=Monotonic(455.0),
    )
    rec = record("a", epoch=1)
    assert judge(rec, seen, LIMITS, Monotonic(500.0)).state is VerdictState.WATCHED

    later = judge(rec, seen, LIMITS, Monotonic(501.0))
    assert later.state is VerdictState.UNWATCHED
    assert later.reason == (
        "no report has reached this control plane for 46 s although the agent passes its check in Consul; "
        "check api.advertise and the API port"
    )


def test_a_ready_pod_bridges_report_stale_and_no_more() -> None:
    """Without Consul, the pod's readiness replaces missing reports for the same time; an agent that is not ready, or
    has no readiness, counts as without it."""
    up = placement("a", 1)
    states = {}
    for ready in (True, False, None):
        seen = Evidence(
            replace(up, ready=ready), None, None, Monotonic(0.0), quiet_since=Monotonic(470.0)
        )
        states[ready] = judge(record("a", epoch=1), seen, LIMITS, Monotonic(500.0)).state

    assert states == {
        True: VerdictState.WATCHED,
        False: VerdictState.UNWATCHED,
        None: VerdictState.UNWATCHED,
    }
    seen = Evidence(
        replace(up, ready=True), None, None, Monotonic(0.0), quiet_since=Monotonic(450.0)
    )
    late = judge(record("a", epoch=1), seen, LIMITS, Monotonic(500.0))
    assert late.state is VerdictState.UNWATCHED
    assert "although the scheduler finds the agent ready" in late.reason


@settings(max_examples=300, deadline=None)
@given(evidence)
def test_silence_is_never_healthy(seen: Evidence) -> None:
    """No device is watched if nothing was received from its agent for longer than report_stale."""
    heard_at = max(seen.quiet_since, seen.report.received_at if seen.report else 0.0)
    verdict = judge(record("a", epoch=1, instance="i"), seen, LIMITS, Monotonic(200.0))

    if verdict.state is VerdictState.WATCHED:
        assert 200.0 - heard_at <= LIMITS.report_stale_s


@settings(max_examples=300, deadline=None)
@given(evidence)
def test_a_suspicion_ends(seen: Evidence) -> None:
    """A device is not suspect for longer than the limit, nor repairing if the repair does not end in time."""
    told = seen.report
    limits = replace(LIMITS, suspect_max_s=100.0, repairing_max_s=100.0)
    verdict = judge(record("a", epoch=1, instance="i"), seen, limits, Monotonic(200.0))

    if verdict.state is VerdictState.SUSPECT:
        assert seen.suspect_since is None or 200.0 - seen.suspect_since <= 100.0
    if verdict.state is VerdictState.REPAIRING and told is not None:
        assert told.state_age_s <= 100.0
    if verdict.state is VerdictState.REPAIRING and told is None:
        assert seen.before is VerdictState.REPAIRING
        assert 200.0 - seen.quiet_since <= 100.0


def test_what_never_answered_is_unwatched_in_the_end() -> None:
    """A device that has answered no agent yet is suspect for suspect_max, then unwatched with what to check; its agent
    is still ready, and delays no roll-out."""
    told = report(state=AgentState.SUSPECT, misses=30, was_ready=False, reason="tcp:80: refused")
    rec = record("a", epoch=1, instance="i")
    young = Evidence(placement("a", 1), told, None, Monotonic(0.0), suspect_since=Monotonic(0.0))
    assert judge(rec, young, LIMITS, Monotonic(120.0)).state is VerdictState.SUSPECT

    old = judge(rec, young, LIMITS, Monotonic(121.0))
    assert (old.state, old.ready) == (VerdictState.UNWATCHED, True)
    assert old.reason == (
        "tcp:80: refused; the device has never answered an agent: check its address and its class's probes; "
        "for 121 s"
    )


def test_no_answer_yet_is_no_health() -> None:
    """An agent whose probes have run without an answer, too few times for a suspicion, reports `ok`: its device is not
    watched, and an existing condition stays."""
    told = report(state=AgentState.OK, was_ready=False, reason="no probe has answered yet")
    seen = Evidence(placement("a", 1), told, None, Monotonic(0.0))
    found = judge(record("a", epoch=1, instance="i"), seen, LIMITS, Monotonic(101.0))
    assert (found.state, found.decides) == (VerdictState.SUSPECT, False)


def test_unable_to_ask_is_our_problem() -> None:
    """If its agent is unable, a device is unwatched with the agent's reason, and the agent is ready."""
    told = report(state=AgentState.UNABLE, reason="can't resolve cam.local: timed out")
    seen = Evidence(placement("a", 1), told, None, Monotonic(0.0))
    found = judge(record("a", epoch=1, instance="i"), seen, LIMITS, Monotonic(101.0))

    assert (found.state, found.ready) == (VerdictState.UNWATCHED, True)
    assert found.reason == "the agent can't ask: can't resolve cam.local: timed out"


def test_a_device_that_beats_and_does_not_answer_is_degraded_in_the_end() -> None:
    """A device that its agent reports offline and that sends heartbeats is suspect, and degraded after suspect_max."""
    told = report(state=AgentState.OFFLINE, misses=3, confirmed=True, reason="no answer")
    rec = record("a", epoch=1, instance="i")
    states = []
    for since in (50.0, -100.0):
        seen = Evidence(
            placement("a", 1),
            told,
            None,
            Monotonic(0.0),
            beat_at=Monotonic(95.0),
            suspect_since=Monotonic(since),
        )
        states.append(judge(rec, seen, LIMITS, Monotonic(101.0)).state)
    assert states == [VerdictState.SUSPECT, VerdictState.DEGRADED]


def test_refused_reports_are_the_reason() -> None:
    """A running agent whose reports are rejected is unwatched as soon as the last accepted one is stale, with the
    answer in the reason, and without a start-up grace."""
    seen = Evidence(
        placement("a", 1),
        None,
        Health("passing", Epoch(1)),
        Monotonic(100.0),
        quiet_since=Monotonic(55.0),
        refusal="HTTP 401 (unknown key)",
    )
    rec = record("a", epoch=1)
    assert judge(rec, seen, LIMITS, Monotonic(100.0)).state is VerdictState.WATCHED
    late = judge(rec, seen, LIMITS, Monotonic(101.0))
    assert late.state is VerdictState.UNWATCHED
    assert late.reason == "the agent's reports are refused: HTTP 401 (unknown key)"


def test_a_lost_node_is_our_problem() -> None:
    """If its node does not answer, a device is unwatched, whatever was reported before."""
    seen = Evidence(
        placement("a", 1, PlacementState.LOST), report(state=AgentState.OK), None, Monotonic(0.0)
    )

    assert (
        judge(record("a", epoch=1), seen, LIMITS, Monotonic(101.0)).state is VerdictState.UNWATCHED
    )


def test_an_unconfirmed_claim_is_a_suspicion() -> None:
    """A report of offline without a confirmation, or for a device that never answered, leads to suspect."""
    for told in (
        report(state=AgentState.OFFLINE, misses=3, confirmed=False),
        report(state=AgentState.OFFLINE, misses=3, confirmed=True, was_ready=False),
    ):
        seen = Evidence(placement("a", 1), told, None, Monotonic(0.0))
        verdict = judge(record("a", epoch=1), seen, LIMITS, Monotonic(101.0))

        assert verdict.state is VerdictState.SUSPECT


def test_an_agent_that_its_scheduler_does_not_list_is_named() -> None:
    """Its reports count, and the reason states that no scheduler knows the agent; not for a report that may have been
    in flight when the listing changed."""
    waits = placement("a", 1, PlacementState.STARTING)
    known = Evidence(waits, report(), None, Monotonic(0.0))
    late = replace(known, unlisted_since=Monotonic(90.0))
    early = replace(known, unlisted_since=Monotonic(20.0))
    now, rec = Monotonic(101.0), record("a", epoch=1, instance="i")
    for found in (judge(rec, known, LIMITS, now), judge(rec, late, LIMITS, now)):
        assert (found.state, found.unlisted) == (VerdictState.WATCHED, False)
    named = judge(rec, early, LIMITS, now)
    assert (named.state, named.unlisted, named.ready) == (VerdictState.WATCHED, True, True)
    assert "does not know the agent that reports (instance i)" in named.reason


def test_the_last_word_of_an_agent_that_has_ended_is_no_reason() -> None:
    """If an agent reported that it is shutting down, and no node can run it again, the verdict has the scheduler's
    reason, at once and after the grace; while it still runs, the verdict has the agent's reason."""
    said = report(ready=False, stopping=True)
    why = "no node can run it: memory (2 nodes)"
    rec = record("a", epoch=1, instance="i")
    for state in (PlacementState.PENDING, PlacementState.RESTARTING, PlacementState.STARTING):
        waits = replace(placement("a", 1, state), reason=why, queued=True)
        seen = Evidence(waits, said, None, Monotonic(100.0))
        soon, late = (judge(rec, seen, LIMITS, Monotonic(at)) for at in (101.0, 190.0))
        assert soon.reason == f"agent {state.value}: {why}"
        assert late.reason == f"agent {state.value}: {why}; for 90 s"
        assert (soon.state, late.state) == (VerdictState.STARTING, VerdictState.UNWATCHED)
    runs = Evidence(placement("a", 1), said, None, Monotonic(100.0))
    assert judge(rec, runs, LIMITS, Monotonic(101.0)).reason == "the agent is shutting down"
