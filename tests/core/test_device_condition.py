"""An outage outlives its agent: what changes the condition of a device, and the verdict meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core import device_condition, presence
from nomad_watchdog.core.verdict import Evidence, judge, of_agent
from nomad_watchdog.model import (
    MAX_REASON,
    AgentState,
    Condition,
    ConditionState,
    Departure,
    Epoch,
    Monotonic,
    PlacementState,
    Verdict,
    VerdictState,
    WallTime,
)
from tests.core.test_verdict import LIMITS, evidence, report
from tests.core.world import placement, record

BEGAN = WallTime(1_000.0)
conditions = st.builds(
    Condition,
    st.sampled_from(ConditionState),
    st.floats(0, 2e9).map(WallTime),
    st.text(max_size=MAX_REASON),
    st.integers(0, 9),
)
DEAD = Condition(ConditionState.OFFLINE, BEGAN, "tcp:80 and icmp: no answer", 3)


def has_decided(seen: Evidence) -> bool:
    """Whether a fresh report of the accepted, ready agent states a problem, or that there is none."""
    told = seen.report
    return (
        told is not None
        and told.ready
        and not told.stopping
        and 200.0 - told.received_at <= LIMITS.report_stale_s
        and told.state not in (AgentState.SUSPECT, AgentState.UNABLE)
        and (told.was_ready or told.state is not AgentState.OK)
    )


@settings(max_examples=300, deadline=None)
@given(evidence, conditions)
def test_only_an_accepted_agents_word_ends_a_condition(seen: Evidence, kept: Condition) -> None:
    """Whatever happens to agents, nodes and control planes, the condition, its start and the verdict stay until a fresh
    report of the accepted, ready agent decides."""
    now, rec = Monotonic(200.0), record("a", epoch=1, instance="i")
    found = of_agent(rec, seen, LIMITS, now)
    after = device_condition.after(found, kept, WallTime(5.0), 1)
    shown = judge(rec, replace(seen, condition=kept), LIMITS, now)

    if not has_decided(seen):
        assert after is kept
        assert shown.state.value == kept.state.value
        assert shown.reason.startswith(kept.reason)
        assert shown.agent is found.state
    if after is not None:
        assert after.since == (kept.since if after.state is kept.state else 5.0)
        assert len(after.reason) <= MAX_REASON


@settings(max_examples=300, deadline=None)
@given(evidence, st.none() | conditions)
def test_s6_no_condition_comes_from_silence(seen: Evidence, kept: Condition | None) -> None:
    """A new condition requires the whole evidence of a report, and never follows from a missing report."""
    now, rec = Monotonic(200.0), record("a", epoch=1, instance="i")
    after = device_condition.after(of_agent(rec, seen, LIMITS, now), kept, WallTime(5.0), 1)

    if after is not None and after is not kept:
        assert has_decided(seen)
        assert seen.report is not None
        if after.state is ConditionState.OFFLINE:
            assert seen.report.was_ready
            assert seen.report.confirmed
            assert seen.report.misses > 0


def test_the_reason_says_what_the_agent_is_about() -> None:
    """While its agent is replaced, cut off, in doubt or repairing, the reason of the condition states it."""
    rec = record("a", epoch=1, instance="i")
    said = {}
    for name, told, run, known in (
        ("replaced", None, None, replace(rec, instance="")),
        ("stopping", None, placement("a", 1, PlacementState.STOPPING), replace(rec, instance="")),
        ("lost", None, placement("a", 1, PlacementState.LOST), rec),
        ("suspect", report(state=AgentState.SUSPECT), placement("a", 1), rec),
        ("repairing", report(state=AgentState.REPAIRING, reason="repairing: unit x"), placement("a", 1), rec),
        ("unable", report(state=AgentState.UNABLE, reason="no route"), placement("a", 1), rec),
        ("restarted", None, placement("a", 1), rec),
    ):  # fmt: skip
        seen = Evidence(run, told, None, Monotonic(90.0), condition=DEAD)
        verdict = judge(known, seen, LIMITS, Monotonic(101.0))
        assert verdict.state is VerdictState.OFFLINE
        said[name] = verdict.reason.removeprefix(DEAD.reason + "; ")

    assert said == {
        "replaced": "its agent is being replaced (an agent is being started)",
        "stopping": "its agent is being replaced (the old agent is being shut down first)",
        "lost": "its agent can't check this now (node ? does not answer the scheduler)",
        "suspect": "its agent is checking this",
        "repairing": "repairing: unit x",
        "unable": "its agent can't check this now (the agent can't ask: no route)",
        "restarted": "its agent has not confirmed this yet (agent running, no report of it)",
    }


def test_a_departed_device_has_no_condition() -> None:
    """The condition ends with the departure, in the verdict and in the record, and does not return with the device."""
    assert device_condition.after(Verdict(VerdictState.DEPARTED, ""), DEAD, BEGAN, 0) is None
    sick = replace(record("a", epoch=3), condition=DEAD)
    gone = presence.deregister(sick, WallTime(9.0), Departure.EXPIRED)
    assert gone is not None
    assert gone.condition is None
    back = presence.revive(gone, WallTime(10.0))
    assert back is not None
    assert back.condition is None


def test_an_epoch_and_a_binding_leave_the_condition() -> None:
    """A replaced agent (next epoch, another instance) inherits the condition of its device."""
    sick = replace(record("a", epoch=3, instance="i"), condition=DEAD)
    moved = presence.bind(presence.advance(sick, Epoch(4)), "j")
    assert (moved.condition, moved.epoch, moved.instance) == (DEAD, 4, "j")


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_a_restored_backup_undoes_no_newer_condition(
    old_generation: int, old_epoch: int, new_generation: int, new_epoch: int
) -> None:
    """The condition comes with the newer desired state, or else with the higher epoch; in doubt the stored one
    stays."""
    stored = replace(record("a"), generation=old_generation, epoch=Epoch(old_epoch), condition=None)
    saved = replace(record("a"), generation=new_generation, epoch=Epoch(new_epoch), condition=DEAD)
    result = presence.restore(stored, saved) or stored
    newer = (new_generation, new_epoch) > (old_generation, old_epoch)
    assert result.condition == (DEAD if newer else None)
    assert presence.restore(None, saved) == replace(saved, index=0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("tls: expires on 2027-01-01, in 5 days", "tls: expires on 2027-01-01, in 4 days", True),
        ("http: took 0.351 s (warn_time is 0.2)", "http: took 1.2 s (warn_time is 0.2)", True),
        (
            "icmp: 12% of the last 60 probes were lost",
            "icmp: 7% of the last 60 probes were lost",
            True,
        ),
        ("no answer, 45 times; but icmp answers", "no answer, 3 times; but icmp answers", True),
        ("http:80: status 503, not 200", "http:80: status 502, not 200", False),
        ("tcp:80: no answer within 1 s", "tcp:443: no answer within 1 s", False),
        ("tcp:80: no answer within 1 s", "tcp:80: connection refused", False),
    ],
)
def test_a_reason_of_the_same_kind_differs_in_what_is_measured(
    one: str, other: str, same: bool
) -> None:
    """Different ages, times, shares and counts are the same kind; another status, port or cause is not."""
    assert (device_condition.kind_of(one) == device_condition.kind_of(other)) is same


def test_renewals_wait_longer_up_to_a_bound() -> None:
    """The first wait is 5 s, and each further one twice as long, at most 300 s."""
    waits = [device_condition.renew_after_s(number) for number in (1, 2, 3, 7, 10_000)]
    assert waits == [5.0, 10.0, 20.0, 300.0, 300.0]
