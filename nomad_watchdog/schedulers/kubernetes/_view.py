"""What the API server's lists say, as placements. Pure: values in, values out.

A pod's phase lies: it is Running while its container crash-loops, while its node does not answer and
while it is told to stop. So a state comes from the times, conditions and container states.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, Slug, parse_device_id, slug_of
from nomad_watchdog.model import Epoch, Placement, PlacementState, WallTime
from nomad_watchdog.schedulers.kubernetes import names
from nomad_watchdog.schedulers.kubernetes.names import KINDS, Kind, Ref

OVERDUE_S: Final = 5.0
"""A pod that is still there so long after its grace period is on a node that does not answer."""
_FAULTS: Final = frozenset(
    {
        "CrashLoopBackOff",
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
    }
)
_IMAGE: Final = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
)
_ENDED: Final = frozenset({"Succeeded", "Failed"})

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose agent an object or a pod is, from its labels and annotations."""

    slug: Slug
    device_id: DeviceId
    epoch: Epoch
    kind: Kind
    agent_class: str
    spec_hash: str
    api: tuple[str, ...] = ()


def identity(thing: Object) -> Identity:
    """Raises UserError when its labels do not hold together."""
    meta = thing["metadata"]
    labels, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    device_id = parse_device_id(notes.get(names.DEVICE_ID))
    slug = slug_of(device_id)
    number = labels.get(names.EPOCH, "")
    kind = next((one for one in KINDS if one == labels.get(names.WORKLOAD)), None)
    whole = number.isascii() and number.isdigit() and len(number) < 19
    if labels.get(names.SLUG) != slug or not whole or kind is None:
        raise UserError("labels of an object do not hold together: slug, epoch or workload")
    return Identity(
        slug,
        device_id,
        Epoch(int(number)),
        kind,
        labels.get(names.CLASS, ""),
        notes.get(names.SPEC_HASH, ""),
        tuple(notes.get(names.API, "").split()),
    )


def time_of(text: str | None) -> float:
    """Unix seconds of a timestamp; 0 for none."""
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


def placements(
    objects: Iterable[Object], pods: Iterable[Object], now: WallTime
) -> tuple[dict[Slug, tuple[Placement, ...]], int]:
    """All placements, and how many things claim to be ours and make no sense. `objects`: Deployments
    and StatefulSets, of which metadata is enough."""
    malformed = 0
    owners: dict[tuple[Slug, str, Kind], tuple[Identity, Object]] = {}
    below: dict[tuple[Slug, str, Kind], list[tuple[Identity, Object]]] = defaultdict(list)
    for things, into in ((objects, owners), (pods, None)):
        for thing in things:
            try:
                who = identity(thing)
            except UserError:
                malformed += 1
                continue
            key = (who.slug, thing["metadata"]["namespace"], who.kind)
            if into is not None:
                into[key] = (who, thing)
            else:
                below[key].append((who, thing))
    found: dict[Slug, list[Placement]] = defaultdict(list)
    for key in owners.keys() | below.keys():
        owner = owners.get(key)
        by_epoch: dict[Epoch, list[tuple[Identity, Object]]] = defaultdict(list)
        for who, pod in below.get(key, ()):
            by_epoch[who.epoch].append((who, pod))
        if owner is not None:
            by_epoch.setdefault(owner[0].epoch, [])
        for epoch, some in by_epoch.items():
            whose = some[0][0] if some else owner[0] if owner is not None else None
            assert whose is not None
            found[key[0]].append(_placement(whose, key[1], epoch, owner, [p for _, p in some], now))
    return {
        slug: tuple(sorted(some, key=lambda one: (one.epoch, one.created_at, one.ref)))
        for slug, some in found.items()
    }, malformed


def _placement(  # one call, one place
    who: Identity,
    namespace: str,
    epoch: Epoch,
    owner: tuple[Identity, Object] | None,
    pods: Sequence[Object],
    now: WallTime,
) -> Placement:
    live = [pod for pod in pods if _phase(pod) not in _ENDED]
    active = [pod for pod in live if not _leaving(pod)]
    newest = max(pods, key=_created, default=None)
    state, reason = _state(who, epoch, owner, pods, now)
    # A pod that is being replaced counts no more: its successor may be accepted.
    holding = active or live
    born = [_created(pod) for pod in pods]
    if owner is not None:
        born.append(_created(owner[1]))
    return Placement(
        slug=who.slug,
        device_id=who.device_id,
        epoch=epoch,
        agent_class=who.agent_class,
        spec_hash=who.spec_hash,
        state=state,
        ref=str(Ref(namespace, who.kind, names.name_of(who.slug), epoch)),
        instances=tuple(sorted(pod["metadata"]["uid"] for pod in holding)),
        node=(newest.get("spec") or {}).get("nodeName", "") if newest else "",
        restarts=max(0, len(pods) - 1) + (_restarts(newest) if newest else 0),
        reason=reason,
        created_at=WallTime(min(born)),
        ready=_ready(max(active, key=_created)) if active else None,
        waits_since=WallTime(max(born)),
        queued=not any((pod.get("spec") or {}).get("nodeName") for pod in active),
        api=who.api,
    )


def _state(
    who: Identity,
    epoch: Epoch,
    owner: tuple[Identity, Object] | None,
    pods: Sequence[Object],
    now: WallTime,
) -> tuple[PlacementState, str]:
    live = [pod for pod in pods if _phase(pod) not in _ENDED]
    active = [pod for pod in live if not _leaving(pod)]
    ended = max((p for p in pods if _phase(p) in _ENDED), key=_created, default=None)
    keeps = owner is not None and owner[0].epoch == epoch and not _leaving(owner[1])
    if who.kind != "pod" and not keeps:
        return _unkept(owner, epoch, live, ended, now)
    if active:
        return pod_state(max(active, key=_created))
    if live:
        pod = max(live, key=_created)
        if is_lost(pod, now):
            return PlacementState.LOST, _lost(pod)
        state = PlacementState.STOPPING if who.kind == "pod" else PlacementState.RESTARTING
        return state, _why_leaving(pod)
    if who.kind == "pod":
        return PlacementState.DEAD, ending(ended) if ended else "gone"
    if ended is not None:
        return PlacementState.RESTARTING, f"{ending(ended)}; another is being started"
    return PlacementState.PENDING, _unmade(owner[1] if owner else {})


def _unkept(
    owner: tuple[Identity, Object] | None,
    epoch: Epoch,
    live: Sequence[Object],
    ended: Object | None,
    now: WallTime,
) -> tuple[PlacementState, str]:
    """Of pods whose object is gone, is being deleted, or is at another epoch already."""
    lost = next((pod for pod in live if is_lost(pod, now)), None)
    if lost is not None:
        return PlacementState.LOST, _lost(lost)
    if live and owner is not None and owner[0].epoch != epoch:
        return PlacementState.STOPPING, f"is being replaced by epoch {owner[0].epoch}"
    if owner is not None and owner[0].epoch == epoch:
        return PlacementState.STOPPING, "told to stop"
    if not live:
        return PlacementState.DEAD, ending(ended) if ended else "gone"
    if any(not _leaving(pod) for pod in live):
        # Its object was deleted, and the garbage collector has not come to it yet.
        return PlacementState.STOPPING, "its object is gone"
    return PlacementState.STOPPING, _why_leaving(live[0])


def pod_state(pod: Object) -> tuple[PlacementState, str]:
    """Of one that is not told to stop and has not ended."""
    conditions = _conditions(pod)
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return PlacementState.PENDING, f"no node takes it: {scheduled.get('message', '')}"[:300]
    if not (pod.get("spec") or {}).get("nodeName"):
        return PlacementState.PENDING, "waits for the scheduler"
    if _cut_off(pod):
        return PlacementState.LOST, _lost(pod)
    for status in (pod.get("status") or {}).get("containerStatuses") or []:
        state = status.get("state") or {}
        waiting = state.get("waiting") or {}
        reason = waiting.get("reason", "")
        if reason in _IMAGE:
            return PlacementState.STARTING, f"{reason}: {waiting.get('message', '')}"[:300]
        if reason in _FAULTS:
            return PlacementState.RESTARTING, _fault(status, waiting)
        if "terminated" in state:
            return PlacementState.RESTARTING, _exit(state["terminated"])
        if "running" not in state:
            fate = (
                PlacementState.RESTARTING if status.get("restartCount") else PlacementState.STARTING
            )
            return fate, waiting.get("message") or reason
    if _phase(pod) == "Running":
        return PlacementState.RUNNING, ""
    return PlacementState.STARTING, ""


def is_lost(pod: Object, now: WallTime) -> bool:
    """Whether nothing is heard of a pod's node, so that its process may be left."""
    if not (pod.get("spec") or {}).get("nodeName"):
        return False
    overdue = time_of(pod["metadata"].get("deletionTimestamp"))
    return _cut_off(pod) or bool(overdue and now - overdue > OVERDUE_S)


def key_of(thing: Object) -> tuple[str, str]:
    """The namespace and the slug of an object or a pod."""
    meta = thing["metadata"]
    return meta["namespace"], (meta.get("labels") or {}).get(names.SLUG, "")


def is_settled(objects: Iterable[Object], pods: Collection[Object]) -> bool:
    """Whether nothing of this is told otherwise only because time passes: no pod is overdue some day, and no
    object's status will be asked for because it has had no pod for a while."""
    kept = {key_of(pod) for pod in pods}
    return not any(_leaving(pod) for pod in pods) and all(key_of(one) in kept for one in objects)


def is_unschedulable(pod: Object) -> bool:
    told = _conditions(pod).get("PodScheduled") or {}
    return told.get("status") == "False" and told.get("reason") == "Unschedulable"


def is_calm(kind: str, pod: Object) -> bool:
    """Whether an event only confirms what was asked for: a start that was made, is placed, runs."""
    if kind == "DELETED" or _leaving(pod) or _phase(pod) in _ENDED:
        return False
    scheduled = _conditions(pod).get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return True  # one that finds no node waits for one anyway
    return pod_state(pod)[0] in {
        PlacementState.PENDING,
        PlacementState.STARTING,
        PlacementState.RUNNING,
    } and not _restarts(pod)


def _cut_off(pod: Object) -> bool:
    """Its containers were ready when the kubelet last spoke, and the node's controller says that the pod
    is not: that is how it marks the pods of a node that has fallen silent."""
    if (pod.get("spec") or {}).get("readinessGates"):
        return False  # then others may say that of a healthy pod
    conditions = _conditions(pod)
    ready, containers = conditions.get("Ready") or {}, conditions.get("ContainersReady") or {}
    return ready.get("status") == "False" and containers.get("status") == "True"


def _lost(pod: Object) -> str:
    return f"node {pod['spec'].get('nodeName', '')} does not answer; a process may be left there"


def _why_leaving(pod: Object) -> str:
    told = _conditions(pod).get("DisruptionTarget") or {}
    if told.get("status") == "True":
        return f"is being moved: {told.get('message') or told.get('reason', '')}"[:300]
    return "told to stop"


def ending(pod: Object) -> str:
    """Why a pod has ended, in words."""
    status = pod.get("status") or {}
    if status.get("reason") or status.get("message"):
        return f"{status.get('reason', '')}: {status.get('message', '')}".strip(": ")[:300]
    for one in status.get("containerStatuses") or []:
        if done := (one.get("state") or {}).get("terminated"):
            return _exit(done)
    return f"the pod has ended ({_phase(pod)})"


def _exit(done: Object) -> str:
    reason, code = done.get("reason", ""), done.get("exitCode", "?")
    if reason == "OOMKilled":
        return f"OOMKilled: it took more memory than its limit (exit code {code})"
    return f"exit code {code}" + (f" ({reason})" if reason and reason != "Error" else "")


def _fault(status: Object, waiting: Object) -> str:
    last = (status.get("lastState") or {}).get("terminated")
    told = f"{waiting['reason']}: {waiting.get('message', '')}".strip(": ")
    return (f"{_exit(last)}; {told}" if last else told)[:300]


def _unmade(owner: Object) -> str:
    """Why an object has no pod."""
    for one in (owner.get("status") or {}).get("conditions") or []:
        if one.get("type") == "ReplicaFailure" and one.get("status") == "True":
            return f"no pod can be made: {one.get('message', '')}"[:300]
    return "waits for its pod"


def _conditions(pod: Object) -> dict[str, Object]:
    return {one["type"]: one for one in (pod.get("status") or {}).get("conditions") or []}


def _phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase", "Pending"))


def _leaving(thing: Object) -> bool:
    return bool(thing["metadata"].get("deletionTimestamp"))


def _created(thing: Object) -> float:
    return time_of(thing["metadata"].get("creationTimestamp"))


def _ready(pod: Object) -> bool | None:
    """What the readiness probe says; None where there is none, for such a pod is ready at once."""
    probed = [one for one in pod["spec"].get("containers") or [] if one.get("readinessProbe")]
    return (_conditions(pod).get("Ready") or {}).get("status") == "True" if probed else None


def _restarts(pod: Object) -> int:
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return sum(one.get("restartCount", 0) for one in statuses)
