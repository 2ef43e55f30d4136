"""(record, placement, report, health, now) → Verdict: the state of a device, for users.

`unwatched` (the state is unknown: our problem) is never reported as `offline` (confirmed: the device's problem). This
project exists to prevent a false "device offline" that is only a slow agent start (S6). The opposite is equally bad:
a device without reports of an accepted agent is never `watched`.

`of_agent` uses what the agent, its scheduler and Consul report now. `judge` adds what was known about the device
before (`core.device_condition`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from nomad_watchdog.core import device_condition as condition
from nomad_watchdog.core import repair_events
from nomad_watchdog.model import (
    AgentState,
    Condition,
    DeviceRecord,
    Health,
    Limits,
    Monotonic,
    Placement,
    PlacementState,
    Presence,
    Report,
    Unheard,
    Verdict,
    VerdictState,
)

_NOT_PLACED: Final = (
    PlacementState.PENDING,
    PlacementState.STARTING,
    PlacementState.RESTARTING,
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known about one device now."""

    placement: Placement | None
    """The live placement at the registry's epoch."""
    report: Report | None
    """The last accepted report at the registry's epoch."""
    health: Health | None
    """The health check of the same epoch in Consul."""
    waiting_since: Monotonic
    """Since when no accepted agent has been ready."""
    leaving: bool = False
    """A placement of an absent device is still there."""
    obstacle: str = ""
    """Why no agent can be started now, in words; "" = nothing prevents it."""
    placed_at: Monotonic | None = None
    """When this placement was dispatched, if this replica observed it; the start is measured from then."""
    beat_at: Monotonic | None = None
    """When the last heartbeat of the device arrived; no probe shares its path."""
    grace_s: float | None = None
    """Maximum time for this start as measured, in seconds; None = the setting."""
    kept: str = ""
    """Why the agent of a device that has left is kept, in words; "" = it is not."""
    condition: Condition | None = None
    """The condition of the device in the registry."""
    quiet_since: Monotonic = field(default=Monotonic(0.0))
    """The latest of: the last accepted report of the device, the moment when its current epoch was first observed
    here, and the start of this control plane."""
    running_since: Monotonic = field(default=Monotonic(0.0))
    """Since when this run of the agent has been observed running; it sends no reports before that."""
    was_watched: bool = False
    """An agent of the device has been ready: if it waits for a node, it is missing, not new."""
    is_unwatched: bool = False
    """The verdict so far is `unwatched`. It ends when an agent is on a node, not when one is requested."""
    suspect_since: Monotonic | None = None
    """Since when the reports have been suspicions; None = the last one was not."""
    unlisted_since: Monotonic | None = None
    """Since when the scheduler has listed the placement without the instance that reports; None = with it, or there
    is no placement."""
    refusal: str = ""
    """Why the API refused the last report of this agent, in words; "" = it has not refused any recently."""
    before: VerdictState | None = None
    """The verdict when this control plane started, if the agent ran then and the verdict is one of `CARRIED`; else
    None. It applies until the first report."""


CARRIED: Final = (VerdictState.SUSPECT, VerdictState.REPAIRING, VerdictState.UNWATCHED)
"""Verdicts that a restart of the control plane carries over until the first report, for at most `report_stale_s`. Not
`watched`: silence is never healthy. Not `offline` and `degraded`, which are in the registry."""


UNLISTED_AFTER_S: Final = 15.0
"""A report that is received this many seconds after `unlisted_since` is from an agent that the scheduler does not
know. An earlier one may have been in flight when its agent ended."""
STARTS_IN_A_ROW: Final = 3
"""Maximum number of graces without a ready agent, for a device whose agent is placed again and again: after that it
is `unwatched`, not `starting`."""


def judge(record: DeviceRecord, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    """The verdict and its reason: from the agent, or else from the kept condition."""
    found = of_agent(record, evidence, limits, now)
    return condition.shown(found, evidence.condition, replaced=is_replaced(record, evidence))


def is_replaced(record: DeviceRecord, evidence: Evidence) -> bool:
    """Whether no agent at the record's epoch has reported yet."""
    return evidence.placement is None or not record.instance


def of_agent(record: DeviceRecord, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    """The verdict without the kept condition.

    Only a passing check in Consul is used: it shows that the agent is up. A critical check does not count against the
    device."""
    if record.presence is Presence.ABSENT:
        return _departed(evidence)
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
    return _of_placed(placement, evidence, limits, now)


def _departed(evidence: Evidence) -> Verdict:
    if evidence.leaving and evidence.kept:
        return Verdict(VerdictState.DEPARTED, evidence.kept)
    gone = "its agent is being shut down" if evidence.leaving else "the device has left"
    return Verdict(VerdictState.DEPARTED, gone)


def _of_placed(placement: Placement, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    report = evidence.report
    if report is not None and report.stopping and placement.state in _NOT_PLACED:
        # The last report of an agent that has ended: the verdict is why no other runs yet.
        return _not_started(placement, evidence, limits, now)
    if report is not None and now - report.received_at <= limits.report_stale_s:
        found = _reported(report, evidence, limits, now)
        return _unlisted(found, placement, report, evidence)
    return _silent(placement, evidence, limits, now)


def _without_agent(evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    if evidence.obstacle:
        return Verdict(VerdictState.UNWATCHED, evidence.obstacle)
    waited = now - evidence.waiting_since
    if _is_in_grace(evidence, limits, now):
        state = VerdictState.UNWATCHED if evidence.is_unwatched else VerdictState.STARTING
        return Verdict(state, "an agent is being started")
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
    return _ready(report, evidence, limits, now)


def _ready(report: Report, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    """The agent is ready and reports a state of the device."""
    match report.state:
        case AgentState.OK if report.was_ready:
            return _decided(VerdictState.WATCHED, report.reason or "the device answers")
        case AgentState.DEGRADED:
            return _decided(VerdictState.DEGRADED, report.reason or "the device answers in part")
        case AgentState.UNABLE:
            why = report.reason or "no reason given"
            return Verdict(VerdictState.UNWATCHED, f"the agent can't ask: {why}", ready=True)
        case AgentState.REPAIRING:
            return _repairing(report, evidence, limits, now)
        case AgentState.OFFLINE:
            return _claimed_offline(report, evidence, limits, now)
        case AgentState.OK:
            # Misses are still being counted: the device is not known to be healthy.
            why = report.reason or "no probe has answered yet"
            return _suspect(why, report, evidence, limits, now)
        case _:
            return _suspect(report.reason, report, evidence, limits, now)


def _unlisted(found: Verdict, placement: Placement, report: Report, evidence: Evidence) -> Verdict:
    """Keep the verdict of the report, and add to its reason that the scheduler does not know the agent."""
    since = evidence.unlisted_since
    if since is None or report.received_at - since < UNLISTED_AFTER_S:
        return found
    said = (
        f"the scheduler does not know the agent that reports (instance {report.instance}); the one that it "
        f"knows is {placement.state.value}"
    )
    return replace(found, reason=f"{found.reason}; {said}", unlisted=True)


def _decided(state: VerdictState, reason: str) -> Verdict:
    return Verdict(state, reason, ready=True, decides=True)


def _is_proved(report: Report) -> bool:
    # S6: the claim counts only with complete evidence.
    return report.was_ready and report.misses > 0 and report.confirmed


def _repairing(report: Report, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    lasted_s = report.state_age_s + (now - report.received_at)
    if lasted_s <= limits.repairing_max_s:
        return Verdict(VerdictState.REPAIRING, report.reason, ready=True)
    # A repair may hide a fault only for a limited time.
    why = f"{report.reason}; for {lasted_s:.0f} s"
    if _is_proved(report):
        return _offline(report, evidence, limits, now)
    return Verdict(VerdictState.UNWATCHED, f"a repair does not end: {why}", ready=True)


def _suspect(
    reason: str, report: Report, evidence: Evidence, limits: Limits, now: Monotonic
) -> Verdict:
    since = evidence.suspect_since
    lasted_s = 0.0 if since is None else now - since
    if report.state is AgentState.SUSPECT:
        lasted_s = max(lasted_s, report.state_age_s + (now - report.received_at))
    if lasted_s <= limits.suspect_max_s:
        return Verdict(VerdictState.SUSPECT, reason, ready=True, suspected=True)
    why = (
        "this is neither confirmed nor refuted"
        if report.was_ready
        else "the device has never answered an agent: check its address and its class's probes"
    )
    said = f"{reason}; {why}; for {lasted_s:.0f} s"
    return Verdict(VerdictState.UNWATCHED, said, ready=True, suspected=True)


def _claimed_offline(report: Report, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    if _is_proved(report):
        return _offline(report, evidence, limits, now)
    missing = "not confirmed" if report.was_ready else "it never answered"
    return _suspect(f"{report.reason} ({missing})", report, evidence, limits, now)


def _offline(report: Report, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    # The agent's probes and its confirmation share a network card; the device's heartbeats do not.
    beat_at = evidence.beat_at
    if beat_at is not None and now - beat_at <= limits.heartbeat_fresh_s:
        beat = f"but the device sent a sign of life {now - beat_at:.0f} s ago"
        since = evidence.suspect_since
        lasts = since is not None and now - since > limits.suspect_max_s
        return Verdict(
            VerdictState.DEGRADED if lasts else VerdictState.SUSPECT,
            f"{report.reason}; {beat}",
            ready=True,
            decides=True,
            suspected=True,
        )
    return _decided(VerdictState.OFFLINE, report.reason + repair_events.in_words(report.repairs))


def _silent(placement: Placement, evidence: Evidence, limits: Limits, now: Monotonic) -> Verdict:
    quiet_s = now - evidence.quiet_since
    passes = _passes(placement, evidence)
    before = evidence.before if evidence.report is None else None
    overdue = quiet_s > limits.report_stale_s
    silent_s = now - max(evidence.quiet_since, evidence.running_since)
    if before is not None and placement.state is PlacementState.RUNNING and not overdue:
        # Not a start: the agent has reported at this epoch, to the process before this one.
        return _carried(before, quiet_s, evidence, limits, now, ready=bool(passes))
    if passes and not overdue:
        # Only until the first report is due: silence is never healthy.
        return Verdict(VerdictState.WATCHED, f"{passes}; no report of it here yet", ready=True)
    runs_silently = placement.state is PlacementState.RUNNING and silent_s > limits.report_stale_s
    has_reported = any((evidence.refusal, passes, evidence.report, before))
    if runs_silently and (has_reported or not _is_in_grace(evidence, limits, now)):
        return _unheard(passes, evidence, now)
    return _not_started(placement, evidence, limits, now)


def _not_started(
    placement: Placement, evidence: Evidence, limits: Limits, now: Monotonic
) -> Verdict:
    """The verdict for an agent that has not started, with the scheduler's reason if there is one. An agent without a
    node is not `starting`."""
    if placement.state is PlacementState.PENDING:
        said = placement.reason or "the scheduler has not found a node for it yet"
        no_node = placement.queued and placement.reason and evidence.was_watched
        if no_node or (evidence.is_unwatched and _is_in_grace(evidence, limits, now)):
            return Verdict(VerdictState.UNWATCHED, f"agent {placement.state}: {said}")
    if placement.reason:
        return _not_ready(f"agent {placement.state}: {placement.reason}", evidence, limits, now)
    return _not_ready(f"agent {placement.state}, no report of it", evidence, limits, now)


def _carried(
    before: VerdictState,
    quiet_s: float,
    evidence: Evidence,
    limits: Limits,
    now: Monotonic,
    *,
    ready: bool,
) -> Verdict:
    """The verdict from before this control plane started. Suspicions and repairs end after their maximum time here,
    too."""
    why = f"{before.value} before this control plane started; its agent has not reported here yet"
    since, lasted_s = evidence.suspect_since, quiet_s
    most_s = limits.repairing_max_s if before is VerdictState.REPAIRING else limits.suspect_max_s
    if before is VerdictState.SUSPECT and since is not None:
        lasted_s = max(lasted_s, now - since)
    suspected = before is VerdictState.SUSPECT
    if before is not VerdictState.UNWATCHED and lasted_s > most_s:
        before, why = VerdictState.UNWATCHED, f"{why}; for {lasted_s:.0f} s"
    return Verdict(before, why, ready=ready, suspected=suspected)


def _passes(placement: Placement, evidence: Evidence) -> str:
    """Which source other than the agent reports that it is up, in words; "" = none."""
    health = evidence.health
    if health is not None and health.epoch == placement.epoch and health.status == "passing":
        return "the agent passes its check in Consul"
    if placement.state is PlacementState.RUNNING and placement.ready:
        return "the scheduler finds the agent ready"
    return ""


def _unheard(passes: str, evidence: Evidence, now: Monotonic) -> Verdict:
    """The verdict if an agent runs, but its reports are refused or do not arrive."""
    if evidence.refusal:
        refused = f"the agent's reports are refused: {evidence.refusal}"
        return Verdict(VerdictState.UNWATCHED, refused, unheard=Unheard.REFUSED)
    heard_at = max(evidence.quiet_since, evidence.running_since)
    although = f"although {passes}" if passes else "although the agent runs"
    return Verdict(
        VerdictState.UNWATCHED,
        f"no report has reached this control plane for {now - heard_at:.0f} s {although}; check "
        "api.advertise and the API port",
        unheard=Unheard.SILENT,
    )


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
        # A queue, a restart in place or a restart of the control plane is not a start as measured.
        return waited <= longer_s
    return now - placed_at <= measured_s and waited <= STARTS_IN_A_ROW * longer_s


_REPORTED_AS: Final = {
    VerdictState.WATCHED: AgentState.OK,
    VerdictState.SUSPECT: AgentState.SUSPECT,
    VerdictState.DEGRADED: AgentState.DEGRADED,
    VerdictState.REPAIRING: AgentState.REPAIRING,
    VerdictState.OFFLINE: AgentState.OFFLINE,
    VerdictState.UNWATCHED: AgentState.UNABLE,
}


def reported_age_s(state: VerdictState, report: Report | None, now: Monotonic) -> float:
    """How long the agent has been reporting this state, in seconds; 0 = it does not report it."""
    if report is None or _REPORTED_AS.get(state) is not report.state or not report.state_age_s:
        return 0.0
    return report.state_age_s + (now - report.received_at)
