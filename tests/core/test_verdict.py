"""Verdicts: S6 and the difference between our problem and the device's."""

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


@settings(max_examples=300, deadline=None)
@given(evidence)
def test_s6_a_critical_agent_is_no_evidence_against_its_device(seen: Evidence) -> None:
    """Consul's «critical» changes no verdict: it is as if Consul had said nothing."""
    critical = replace(seen, health=Health("critical", Epoch(1)))
    silent = replace(seen, health=None)

    now = Monotonic(200.0)
    rec = record("a", epoch=1)
    assert judge(rec, critical, LIMITS, now) == judge(rec, silent, LIMITS, now)


@settings(max_examples=300, deadline=None)
@given(evidence)
def test_s6_a_device_that_has_just_beaten_is_not_offline(seen: Evidence) -> None:
    """A fresh sign of life turns offline into suspect, or into degraded when that lasts, and changes no other
    verdict."""
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

    assert verdict.state is not VerdictState.OFFLINE
    # only what was suspect before this control plane started, by the word of an agent that had reported
    assert verdict.state is not VerdictState.SUSPECT or seen.before is VerdictState.SUSPECT
    assert verdict.reason


def test_starting_turns_into_unwatched_after_the_grace() -> None:
    """No agent: starting at 60 s, unwatched at 61 s; the words change with it."""
    nothing = Evidence(None, None, None, Monotonic(0.0))
    rec = record("a")

    assert judge(rec, nothing, LIMITS, Monotonic(60.0)).state is VerdictState.STARTING
    assert judge(rec, nothing, LIMITS, Monotonic(61.0)).state is VerdictState.UNWATCHED


def test_a_passing_check_bridges_report_stale_and_no_more() -> None:
    """After a restart of ours the agents' own checks stand in for reports not heard yet, for 45 s; then the
    device is unwatched, whatever the check says, and the reason names where to look."""
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
    """Where there is no Consul, the pod's own readiness stands in for reports not heard yet, as long; an agent
    that is not ready, or is asked by nobody, is what it was without."""
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
    """No device is watched on whose agent nothing was heard for longer than report_stale."""
    heard_at = max(seen.quiet_since, seen.report.received_at if seen.report else 0.0)
    verdict = judge(record("a", epoch=1, instance="i"), seen, LIMITS, Monotonic(200.0))

    if verdict.state is VerdictState.WATCHED:
        assert 200.0 - heard_at <= LIMITS.report_stale_s


@settings(max_examples=300, deadline=None)
@given(evidence)
def test_a_suspicion_ends(seen: Evidence) -> None:
    """What has been suspected for longer than the limit is not suspect any more, nor is a repair that does not
    end a state of its own."""
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
    """A device that answered no agent yet is suspect for suspect_max, then unwatched with what to check; its
    agent is ready all the same, and holds up no roll-out."""
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
    """An agent whose probes have run and were not answered, too few times to suspect anything, reports `ok`: its
    device is not watched, and a kept condition stays."""
    told = report(state=AgentState.OK, was_ready=False, reason="no probe has answered yet")
    seen = Evidence(placement("a", 1), told, None, Monotonic(0.0))
    found = judge(record("a", epoch=1, instance="i"), seen, LIMITS, Monotonic(101.0))
    assert (found.state, found.decides) == (VerdictState.SUSPECT, False)


def test_unable_to_ask_is_our_problem() -> None:
    """An agent that can't ask leaves its device unwatched with its own reason, and is ready."""
    told = report(state=AgentState.UNABLE, reason="can't resolve cam.local: timed out")
    seen = Evidence(placement("a", 1), told, None, Monotonic(0.0))
    found = judge(record("a", epoch=1, instance="i"), seen, LIMITS, Monotonic(101.0))

    assert (found.state, found.ready) == (VerdictState.UNWATCHED, True)
    assert found.reason == "the agent can't ask: can't resolve cam.local: timed out"


def test_a_device_that_beats_and_does_not_answer_is_degraded_in_the_end() -> None:
    """Its agent calls it offline and it sends heartbeats: suspect, and after suspect_max degraded."""
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
    """A running agent whose reports are refused is unwatched as soon as the last accepted one is stale, with
    what was answered, and without waiting for a start-up grace."""
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


def test_an_agent_that_its_scheduler_does_not_list_is_named() -> None:
    """What it reports of the device stands, and the reason says that no scheduler knows the agent; not for a report
    that may have been under way when the listing changed."""
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
    """An agent that said that it is shutting down, and that no node takes again: the scheduler's reason is the
    verdict's, at once and after the grace; while it still runs, its own word is."""
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
