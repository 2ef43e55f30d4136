"""What Nomad's lists say, as placements. Pure: values in, values out.

`Job.Status` lies (it is dead before the process has ended, and for a moment between a failure and its
reschedule), so a state comes from allocations and evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from watchdog_agent.runtime.parsing import whole

from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import Slug, parse_device_id, slug_of
from nomad_watchdog.model import Epoch, Placement, PlacementState, WallTime
from nomad_watchdog.schedulers.nomad.nodes import Nodes

_ENDED: Final = frozenset({"complete", "failed", "lost"})
_EXPECTED: Final = frozenset({"job-register", "queued-allocs", "max-plan-attempts"})
"""Triggers of evaluations that a start makes by itself; one that finds no node waits for one anyway. An
agent that fails shows as an allocation."""
_NS: Final = 1_000_000_000
SECOND_LOOK_S: Final = 2.0
"""A dead job with a failed allocation counts as dead when it still is so after this long."""

SOURCE: Final = "agent_source"
"""In the meta of a job: the replica's address that its agent is fetched from; "" = not from a replica."""
API: Final = "agent_api"
"""In the meta of an agent's job: the addresses that it reports to, separated by spaces."""

Row = Mapping[str, Any]


def identity(job: Row, installation: str) -> tuple[Slug, str, Epoch] | None:
    """Slug, device id and epoch from a job's meta; None when it is not one of our agents.

    Raises UserError when it claims to be one and its meta does not hold together."""
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
        raise UserError("meta of a job does not hold together: slug or epoch")
    return slug, device_id, Epoch(epoch)


def placement(
    job: Row,
    who: tuple[Slug, str, Epoch],
    allocs: Sequence[Row],
    evals: Sequence[Row],
    *,
    settled: bool,
    nodes: Nodes | None = None,
) -> Placement:
    """One job as a placement. `settled`: it was seen dead before, at least SECOND_LOOK_S ago. `nodes`: what is
    known of the cluster's."""
    state, reason = _state(job, allocs, evals, settled=settled)
    newest = max(allocs, key=lambda one: one.get("CreateIndex", 0), default=None)
    if nodes is not None:
        reason = nodes.reason(newest, state, reason)
    holding = [
        one
        for one in allocs
        if one["ClientStatus"] not in _ENDED
        or (one["ClientStatus"] == "lost" and state is PlacementState.LOST)
    ]
    meta = job["Meta"]
    return Placement(
        slug=who[0],
        device_id=parse_device_id(who[1]),
        epoch=who[2],
        agent_class=meta.get("agent_class", ""),
        spec_hash=_spec_hash(meta),
        state=state,
        ref=job["ID"],
        instances=tuple(sorted(one["ID"] for one in holding)),
        node=newest.get("NodeName", "") if newest else "",
        restarts=0 if newest is None else _restarts(newest) + _replaced(allocs, newest),
        reason=reason,
        created_at=age(job)[0],
        waits_since=_began(job, newest),
        queued=bool(evals) and (newest is None or newest["ClientStatus"] in _ENDED),
        source=meta.get(SOURCE, ""),
        api=tuple(meta.get(API, "").split()),
    )


def _began(job: Row, newest: Row | None) -> WallTime:
    """When the job was submitted, or its newest allocation made, whichever is later."""
    made = 0 if newest is None else newest.get("CreateTime") or 0
    return WallTime(max(job.get("SubmitTime") or 0, made) / _NS)


def _spec_hash(meta: Row) -> str:
    """Of what the agent really runs with: its document comes from the dispatch, its template and resources from
    the parent job of that moment. Where these are of two specs it is neither of them. A parent of an older version
    does not say."""
    told = str(meta.get("spec_hash", ""))
    parent = str(meta.get("parent_spec", "")) or told
    return told if parent == told else f"{told}/{parent}"


def age(job: Row) -> tuple[WallTime, str]:
    """Orders the jobs of one epoch as the planner orders placements: of several the least is kept."""
    return WallTime((job.get("SubmitTime") or 0) / _NS), job["ID"]


def unevaluated(job: Row, allocs: Sequence[Row], evals: Sequence[Row]) -> bool:
    """Whether no scheduler has looked at a job or is about to. `evals`: those pending or blocked.

    True for a moment after each dispatch; for longer only when the server crashed between the job and
    its evaluation, which are two writes before Nomad 1.10.5."""
    return job.get("Status") == "pending" and not job.get("Stop") and not allocs and not evals


def _replaced(allocs: Sequence[Row], newest: Row) -> int:
    """Earlier allocations that failed. One that a drain has moved to another node did not."""
    earlier = (one for one in allocs if one is not newest)
    return sum(not (one.get("DesiredTransition") or {}).get("Migrate") for one in earlier)


def _restarts(alloc: Row) -> int:
    return sum(task.get("Restarts", 0) for task in (alloc.get("TaskStates") or {}).values())


def looks_dead(job: Row, allocs: Sequence[Row], evals: Sequence[Row]) -> bool:
    return (
        job.get("Status") == "dead"
        and all(one["ClientStatus"] in _ENDED for one in allocs)
        and not any(one.get("Status") in {"pending", "blocked"} for one in evals)
    )


def _state(
    job: Row, allocs: Sequence[Row], evals: Sequence[Row], *, settled: bool
) -> tuple[PlacementState, str]:
    live = [one for one in allocs if one["ClientStatus"] not in _ENDED]
    stopped = bool(job.get("Stop"))
    newest = max(allocs, key=lambda one: one.get("CreateIndex", 0), default=None)
    if live:
        return _of_live(max(live, key=lambda one: one.get("CreateIndex", 0)), stopped=stopped)
    if looks_dead(job, allocs, evals):
        told = _ending(newest)
        if stopped or settled or (newest and newest["ClientStatus"] == "complete"):
            return PlacementState.DEAD, told or "stopped before it was placed"
        return PlacementState.RESTARTING, told or "ended; looking a second time"
    if stopped:
        return PlacementState.STOPPING, "told to stop"
    if newest is None:
        return PlacementState.PENDING, unplaced(evals)
    if newest["ClientStatus"] == "lost":
        return PlacementState.LOST, _ending(newest)
    return PlacementState.RESTARTING, f"{_ending(newest)}; {unplaced(evals)}"


def _of_live(alloc: Row, *, stopped: bool) -> tuple[PlacementState, str]:
    status = alloc["ClientStatus"]
    if status == "unknown":
        return PlacementState.LOST, f"node {alloc.get('NodeName', '')} does not answer"
    if stopped or alloc.get("DesiredStatus") != "run":
        return PlacementState.STOPPING, alloc.get("DesiredDescription") or "told to stop"
    if status == "running":
        return PlacementState.RUNNING, ""
    if _restarts(alloc) or _failed(alloc):
        return PlacementState.RESTARTING, _ending(alloc)
    return PlacementState.STARTING, alloc.get("ClientDescription") or ""


def is_calm(topic: str, said: Mapping[str, Any]) -> bool:
    """Whether an event only confirms what was asked for: a start that was registered, is placed, runs."""
    if topic == "Allocation":
        if said.get("ClientStatus") in _ENDED or "ClientStatus" not in said:
            return False
        return _of_live(said, stopped=False)[0] in {PlacementState.STARTING, PlacementState.RUNNING}
    return said.get("TriggeredBy") in _EXPECTED


def _events(alloc: Row) -> list[Row]:
    tasks = (alloc.get("TaskStates") or {}).values()
    found = [event for task in tasks for event in task.get("Events") or []]
    return sorted(found, key=lambda event: event.get("Time", 0))


def _failed(alloc: Row) -> bool:
    return any(event.get("Type") in {"Terminated", "Restarting"} for event in _events(alloc))


def _ending(alloc: Row | None) -> str:
    """Why the last run of an allocation ended, in words."""
    if alloc is None:
        return ""
    if alloc["ClientStatus"] == "lost":
        return f"node {alloc.get('NodeName', '')} was lost; a process may be left there"
    telling = {
        "Terminated",
        "Driver Failure",
        "Setup Failure",
        "Killed",
        "Failed Artifact Download",
    }
    words = [
        event.get("DisplayMessage") or event.get("Type", "")
        for event in _events(alloc)
        if event.get("Type") in telling
    ]
    return (words[-1] if words else alloc.get("ClientDescription") or "the task failed")[:300]


def unplaced(evals: Sequence[Row]) -> str:
    """Why no node has an agent yet, in words. `evals`: those of its job that are pending or blocked."""
    for one in evals:
        for metric in (one.get("FailedTGAllocs") or {}).values():
            causes = {
                **(metric.get("ConstraintFiltered") or {}),
                **(metric.get("DimensionExhausted") or {}),
            }
            words = ", ".join(f"{key} ({count} nodes)" for key, count in sorted(causes.items()))
            return f"no node takes it: {words or 'no eligible node in its datacenters and pool'}"[
                :300
            ]
        if one.get("Status") == "blocked":
            return "no node takes it: evaluation is blocked"
    return "waits for the scheduler"
