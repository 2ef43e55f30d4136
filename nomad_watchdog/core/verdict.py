"""(record, placement, report, health, now) → Verdict: the state of a device as a person should read it.

`unwatched` (no accepted agent is ready: our problem) is never reported as `offline` (confirmed: the
device's problem). The false «device offline» that was only a slow agent start is what this project
exists to end (S6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nomad_watchdog.core import repairs
from nomad_watchdog.model import (
    AgentState,
    DeviceRecord,
    Health,
    Limits,
    Monotonic,
    Placement,
    PlacementState,
    Presence,
    Report,
    Verdict,
    VerdictState,
)

_UP: Final = (PlacementState.RUNNING, PlacementState.RESTARTING)


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known about one device now."""

    placement: Placement | None
    """The live placement at the registry's epoch."""
    report: Report | None
    """The last accepted report at the registry's epoch."""
    health: Health | None
    """What Consul says of the same epoch."""
    waiting_since: Monotonic
    """Since when no accepted agent has been ready."""
    leaving: bool = False
    """A placement of an absent device is still there."""
    obstacle: str = ""
    """Why no agent can be started now, in words; empty when nothing is in the way."""
    placed_at: Monotonic | None = None
    """When this placement was dispatched, if we saw it: a start is measured from there."""
    beat_at: Monotonic | None = None
    """When the device last sent a sign of life to us: a path that no probe shares."""
    grace_s: float | None = None
    """How long this start may take, seconds, as measured; None = the setting."""
    kept: str = ""
    """Why the agent of a device that has left stays, in words; empty when it does not."""


STARTS_IN_A_ROW: Final = 3
"""An agent that is placed again and again is not «starting» for ever: after so many graces without a
ready one the device is unwatched, whatever is under way."""


def judge(record: DeviceRecord, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    """The verdict and its reason in words.

    Consul's word is used in one direction: a passing agent is up. A critical one says nothing against
    the device."""
    if record.presence is Presence.ABSENT:
        if evidence.leaving and evidence.kept:
            return Verdict(VerdictState.DEPARTED, evidence.kept)
        gone = "its agent is being shut down" if evidence.leaving else "the device has left"
        return Verdict(VerdictState.DEPARTED, gone)
    placement = evidence.placement
    if placement is None:
        return _without_agent(evidence, limits, now)
    if _is_crash_loop(placement, limits):
        return Verdict(
            VerdictState.FAILING,
            f"agent of spec {placement.spec_hash} restarted {placement.restarts} times: "
            f"{placement.reason or 'no reason given'}",
        )
    if placement.state is PlacementState.LOST:
        return Verdict(
            VerdictState.UNWATCHED, f"node {placement.node or '?'} does not answer the scheduler"
        )
    if placement.state is PlacementState.STOPPING:
        return Verdict(VerdictState.STARTING, "the old agent is being shut down first")
    report = evidence.report
    if report is not None and now - report.received_at <= limits.report_stale_s:
        return _reported(report, evidence, limits, now)
    return _silent(placement, evidence, limits, now)


def _without_agent(evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    if evidence.obstacle:
        return Verdict(VerdictState.UNWATCHED, evidence.obstacle)
    waited = now - evidence.waiting_since
    if _is_in_grace(evidence, limits, now):
        return Verdict(VerdictState.STARTING, "an agent is being started")
    return Verdict(VerdictState.UNWATCHED, f"no agent has been placed for {waited:.0f} s")


def _is_crash_loop(placement: Placement, limits: Limits) -> bool:
    return (
        placement.state is PlacementState.RESTARTING
        and placement.restarts >= limits.crash_loop_restarts
    )


def _reported(report: Report, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    if report.stopping:
        return _not_ready("the agent is shutting down", evidence, limits, now)
    if not report.ready:
        return _not_ready("the agent is not ready yet", evidence, limits, now)
    if report.state is AgentState.OK:
        return Verdict(VerdictState.WATCHED, report.reason or "the device answers")
    if report.state is AgentState.REPAIRING:
        return Verdict(VerdictState.REPAIRING, report.reason)
    if report.state is AgentState.OFFLINE:
        # S6: the claim counts only with its whole evidence.
        if report.was_ready and report.misses > 0 and report.confirmed:
            return _offline(report, evidence, limits, now)
        missing = "it never answered" if not report.was_ready else "not confirmed"
        return Verdict(VerdictState.SUSPECT, f"{report.reason} ({missing})")
    return Verdict(VerdictState.SUSPECT, report.reason)


def _offline(report: Report, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    # The agent's probes and its confirmation share a network card; the device's own beats do not.
    beat_at = evidence.beat_at
    if beat_at is not None and now - beat_at <= limits.heartbeat_fresh_s:
        beat = f"but the device sent a sign of life {now - beat_at:.0f} s ago"
        return Verdict(VerdictState.SUSPECT, f"{report.reason}; {beat}")
    return Verdict(VerdictState.OFFLINE, report.reason + repairs.in_words(report.repairs))


def _silent(placement: Placement, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    health = evidence.health
    if health is not None and health.epoch == placement.epoch and health.status == "passing":
        return Verdict(
            VerdictState.WATCHED, "the agent passes its check in Consul; no report of it here yet"
        )
    if placement.state is PlacementState.RUNNING and placement.ready:
        return Verdict(
            VerdictState.WATCHED, "the scheduler finds the agent ready; no report of it here yet"
        )
    if placement.state not in _UP and placement.reason:
        return _not_ready(f"agent {placement.state}: {placement.reason}", evidence, limits, now)
    return _not_ready(f"agent {placement.state}, no report of it", evidence, limits, now)


def _not_ready(why: str, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    waited = now - evidence.waiting_since
    if _is_in_grace(evidence, limits, now):
        return Verdict(VerdictState.STARTING, why)
    return Verdict(VerdictState.UNWATCHED, f"{why}; for {waited:.0f} s")


def _is_in_grace(evidence: Evidence, limits: Limits, now: Monotonic) -> bool:
    waited, placed_at = now - evidence.waiting_since, evidence.placed_at
    measured_s = limits.startup_grace_s if evidence.grace_s is None else evidence.grace_s
    longer_s = max(measured_s, limits.startup_grace_s)
    if placed_at is None or placed_at < evidence.waiting_since:
        # A queue, a restart in place, or a restart of ours: none of them is a start as measured.
        return waited <= longer_s
    return now - placed_at <= measured_s and waited <= STARTS_IN_A_ROW * longer_s
