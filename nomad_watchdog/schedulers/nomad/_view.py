"""Placements from Nomad's lists. Pure: values in, values out.

`Job.Status` is not reliable: it is dead before the process has ended, and for a moment between a failure and
the reschedule. So the state is determined from allocations and evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from watchdog_agent.runtime.parsing import whole

from nomad_watchdog.clients.nomad_rows import Allocation, Evaluation, Job, TaskEvent
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, Slug, parse_device_id, slug_of
from nomad_watchdog.model import Epoch, Placement, PlacementState, WallTime
from nomad_watchdog.schedulers.nomad.nodes import Nodes

_ENDED: Final = frozenset({"complete", "failed", "lost"})
_EXPECTED: Final = frozenset({"job-register", "queued-allocs", "max-plan-attempts"})
"""Triggers of the evaluations that a start creates. One that finds no node needs no action either. An agent
that fails shows as an allocation."""
_NS: Final = 1_000_000_000
SECOND_LOOK_S: Final = 2.0
"""A dead job with a failed allocation counts as dead after it has been so for this time."""

SOURCE: Final = "agent_source"
"""Key in a job's meta: address of the replica that its agent is downloaded from; "" = not from a replica."""
API: Final = "agent_api"
"""Key in the meta of an agent's job: the addresses that it reports to, separated by spaces."""


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """The device and epoch of a job."""

    slug: Slug
    device_id: DeviceId
    epoch: Epoch


def identity(job: Job, installation: str) -> JobIdentity | None:
    """From a job's meta; None when the job is not one of our agents.

    Raises UserError when its meta is inconsistent."""
    meta = job.get("Meta") or {}
    if "device_id" not in meta or job.get("ParameterizedJob"):
        return None
    if meta.get("installation", "") != installation:
        return None
    device_id = parse_device_id(meta["device_id"])
    slug = slug_of(device_id)
    number = meta.get("epoch", "")
    try:
        epoch = whole(number) if meta.get("slug") == slug else -1
    except ValueError:
        epoch = -1
    if epoch < 0:
        raise UserError("meta of a job is inconsistent: slug or epoch")
    return JobIdentity(slug, device_id, Epoch(epoch))


def placement(
    job: Job,
    who: JobIdentity,
    allocs: Sequence[Allocation],
    evals: Sequence[Evaluation],
    *,
    settled: bool,
    nodes: Nodes | None = None,
) -> Placement:
    """One job as a placement. `settled`: it has looked dead for at least SECOND_LOOK_S. `nodes`: the nodes of
    the cluster, where they are known."""
    state, reason = _state(job, allocs, evals, settled=settled)
    newest = max(allocs, key=_created, default=None)
    if nodes is not None:
        reason = nodes.reason(newest, state, reason)
    holding = [
        one
        for one in allocs
        if one["ClientStatus"] not in _ENDED
        or (one["ClientStatus"] == "lost" and state is PlacementState.LOST)
    ]
    meta = job.get("Meta") or {}
    return Placement(
        slug=who.slug,
        device_id=who.device_id,
        epoch=who.epoch,
        agent_class=meta.get("agent_class", ""),
        spec_hash=_spec_hash(meta),
        state=state,
        ref=job["ID"],
        instances=tuple(sorted(one["ID"] for one in holding)),
        node=newest.get("NodeName", "") if newest else "",
        restarts=0 if newest is None else _restarts(newest) + _replaced(allocs, newest),
        reason=reason,
        created_at=age(job)[0],
        waits_since=_waits_since(job, newest),
        queued=bool(evals) and (newest is None or newest["ClientStatus"] in _ENDED),
        source=meta.get(SOURCE, ""),
        api=tuple(meta.get(API, "").split()),
        node_id=_node_id(job, newest),
    )


def _created(alloc: Allocation) -> int:
    return alloc.get("CreateIndex", 0)


def _node_id(job: Job, newest: Allocation | None) -> str:
    """The node of the newest allocation, "" = there is none of this epoch. When a job is updated in place, its newest
    allocation is that of the epoch before until the scheduler has made another one."""
    if newest is None or _created(newest) < job.get("JobModifyIndex", 0):
        return ""
    return newest.get("NodeID", "")


def _waits_since(job: Job, newest: Allocation | None) -> WallTime:
    """When the job was submitted, or its newest allocation created, whichever is later."""
    made = 0 if newest is None else newest.get("CreateTime") or 0
    return WallTime(max(job.get("SubmitTime") or 0, made) / _NS)


def _spec_hash(meta: Mapping[str, str]) -> str:
    """The spec that the agent runs with: its document comes from the dispatch, its template and resources from
    the parent job at that moment. Both hashes, if they differ. The parent of an older version has none."""
    own = str(meta.get("spec_hash", ""))
    parent = str(meta.get("parent_spec", "")) or own
    return own if parent == own else f"{own}/{parent}"


def age(job: Job) -> tuple[WallTime, str]:
    """Sort key that orders the jobs of one epoch as the planner orders placements: it keeps the first."""
    return WallTime((job.get("SubmitTime") or 0) / _NS), job["ID"]


def unevaluated(job: Job, allocs: Sequence[Allocation], evals: Sequence[Evaluation]) -> bool:
    """Whether no scheduler has evaluated a job or is about to. `evals`: its pending and blocked evaluations.

    True for a moment after each dispatch; for longer only when the server crashed between writing the job and
    its evaluation, which are two writes before Nomad 1.10.5."""
    return job.get("Status") == "pending" and not job.get("Stop") and not allocs and not evals


def wait_forgotten(job: Job, allocs: Sequence[Allocation], evals: Sequence[Evaluation]) -> bool:
    """Whether an agent on a node that does not answer is waited for, and Nomad has nothing left that ends the wait.
    `evals`: the job's pending and blocked evaluations.

    Nomad schedules one evaluation for the end of `max_client_disconnect`, but measures the end from a slightly later
    moment (`createTimeoutLaterEvals`, `Allocation.Expired`). If that evaluation runs before the end, it changes
    nothing and is not repeated: without another one the allocation stays `unknown`, even if its node is purged."""
    return (
        not job.get("Stop")
        and not evals
        and any(
            one["ClientStatus"] == "unknown" and one.get("DesiredStatus") == "run" for one in allocs
        )
    )


def _replaced(allocs: Sequence[Allocation], newest: Allocation) -> int:
    """Number of earlier allocations that failed, without those that a drain moved to another node."""
    earlier = (one for one in allocs if one is not newest)
    return sum(not (one.get("DesiredTransition") or {}).get("Migrate") for one in earlier)


def _restarts(alloc: Allocation) -> int:
    return sum(task.get("Restarts", 0) for task in (alloc.get("TaskStates") or {}).values())


def looks_dead(job: Job, allocs: Sequence[Allocation], evals: Sequence[Evaluation]) -> bool:
    return (
        job.get("Status") == "dead"
        and all(one["ClientStatus"] in _ENDED for one in allocs)
        and not any(one.get("Status") in {"pending", "blocked"} for one in evals)
    )


def _state(
    job: Job, allocs: Sequence[Allocation], evals: Sequence[Evaluation], *, settled: bool
) -> tuple[PlacementState, str]:
    live = [one for one in allocs if one["ClientStatus"] not in _ENDED]
    stopped = bool(job.get("Stop"))
    newest = max(allocs, key=_created, default=None)
    if live:
        return _latest_state(job, max(live, key=_created), stopped=stopped)
    if looks_dead(job, allocs, evals):
        reason = _ending(newest)
        if stopped or settled or (newest and newest["ClientStatus"] == "complete"):
            return PlacementState.DEAD, reason or "stopped before it was placed"
        return (
            PlacementState.RESTARTING,
            reason or "ended; waiting to see whether Nomad restarts it",
        )
    if stopped:
        return PlacementState.STOPPING, "stop requested"
    if newest is None:
        return PlacementState.PENDING, unplaced(evals)
    if newest["ClientStatus"] == "lost":
        return PlacementState.LOST, _ending(newest)
    return PlacementState.RESTARTING, f"{_ending(newest)}; {unplaced(evals)}"


def _latest_state(job: Job, latest: Allocation, *, stopped: bool) -> tuple[PlacementState, str]:
    state, reason = _live_state(latest, stopped=stopped)
    if state is PlacementState.RUNNING and _is_of_last_version(job, latest):
        return PlacementState.STOPPING, "its job was changed, and Nomad replaces it"
    return state, reason


def _is_of_last_version(job: Job, alloc: Allocation) -> bool:
    """Whether Nomad has not looked at an allocation since its job was changed: with the strategy `register`, the run of
    the last epoch. What it looked at is stopped, or updated in place."""
    return alloc.get("ModifyIndex", 0) < job.get("JobModifyIndex", 0) and "ModifyIndex" in alloc


def _live_state(alloc: Allocation, *, stopped: bool) -> tuple[PlacementState, str]:
    status = alloc["ClientStatus"]
    if status == "unknown":
        return PlacementState.LOST, f"node {alloc.get('NodeName', '')} does not answer"
    if stopped or alloc.get("DesiredStatus") != "run":
        return PlacementState.STOPPING, alloc.get("DesiredDescription") or "stop requested"
    if status == "running":
        return PlacementState.RUNNING, ""
    if _restarts(alloc) or _failed(alloc):
        return PlacementState.RESTARTING, _ending(alloc)
    return PlacementState.STARTING, alloc.get("ClientDescription") or ""


def confirms_allocation(alloc: Allocation) -> bool:
    """Whether an event only confirms a requested start: the agent is placed or runs."""
    if alloc.get("ClientStatus") in _ENDED or "ClientStatus" not in alloc:
        return False
    state, _ = _live_state(alloc, stopped=False)
    return state in {PlacementState.STARTING, PlacementState.RUNNING}


def confirms_evaluation(evaluation: Evaluation) -> bool:
    """Whether an event only confirms that a start was requested."""
    return evaluation.get("TriggeredBy") in _EXPECTED


def _events(alloc: Allocation) -> list[TaskEvent]:
    tasks = (alloc.get("TaskStates") or {}).values()
    found = [event for task in tasks for event in task.get("Events") or []]
    return sorted(found, key=lambda event: event.get("Time", 0))


def _failed(alloc: Allocation) -> bool:
    return any(event.get("Type") in {"Terminated", "Restarting"} for event in _events(alloc))


def _ending(alloc: Allocation | None) -> str:
    """Why the last run of an allocation ended; "" when there was none."""
    if alloc is None:
        return ""
    if alloc["ClientStatus"] == "lost":
        return f"node {alloc.get('NodeName', '')} was lost; its process may still run"
    final = {
        "Terminated",
        "Driver Failure",
        "Setup Failure",
        "Killed",
        "Failed Artifact Download",
    }
    words = [
        event.get("DisplayMessage") or event.get("Type", "")
        for event in _events(alloc)
        if event.get("Type") in final
    ]
    return (words[-1] if words else alloc.get("ClientDescription") or "the task failed")[:300]


def unplaced(evals: Sequence[Evaluation]) -> str:
    """Why an agent is not placed yet. `evals`: pending and blocked evaluations of its job."""
    for one in evals:
        for metric in (one.get("FailedTGAllocs") or {}).values():
            causes = {
                **(metric.get("ConstraintFiltered") or {}),
                **(metric.get("DimensionExhausted") or {}),
            }
            words = ", ".join(f"{key} ({count} nodes)" for key, count in sorted(causes.items()))
            reason = words or "no eligible node in its datacenters and pool"
            return f"no node can run it: {reason}"[:300]
        if one.get("Status") == "blocked":
            return "no node can run it: evaluation is blocked"
    return "waiting for the scheduler"
