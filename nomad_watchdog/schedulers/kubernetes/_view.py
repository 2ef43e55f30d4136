"""Placements from the lists of the API server. Pure: values in, values out.

The phase of a pod is not enough: it is Running while the container crash-loops, while the node does not answer
and while the pod is being stopped. So the state is determined from times, conditions and container states.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from nomad_watchdog.clients.kubernetes_objects import (
    Condition,
    ContainerStatus,
    KubernetesObject,
    Terminated,
    Waiting,
)
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, Slug, parse_device_id, slug_of
from nomad_watchdog.model import Epoch, Placement, PlacementState, WallTime
from nomad_watchdog.schedulers import by_device
from nomad_watchdog.schedulers.kubernetes import names
from nomad_watchdog.schedulers.kubernetes.names import KINDS, Kind, Ref

OVERDUE_S: Final = 5.0
"""A pod that exists for this time after its grace period is on a node that does not answer."""
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


@dataclass(frozen=True, slots=True)
class Identity:
    """The device, epoch and spec of an object or a pod, from its labels and annotations."""

    slug: Slug
    device_id: DeviceId
    epoch: Epoch
    kind: Kind
    agent_class: str
    spec_hash: str
    api: tuple[str, ...] = ()


def identity(thing: KubernetesObject) -> Identity:
    """Raises UserError when its labels are inconsistent."""
    meta = thing["metadata"]
    labels, notes = labels_of(thing), meta.get("annotations") or {}
    device_id = parse_device_id(notes.get(names.DEVICE_ID))
    slug = slug_of(device_id)
    number = labels.get(names.EPOCH, "")
    kind = next((one for one in KINDS if one == labels.get(names.WORKLOAD)), None)
    whole = number.isascii() and number.isdigit() and len(number) < 19
    if labels.get(names.SLUG) != slug or not whole or kind is None:
        raise UserError("labels of an object are inconsistent: slug, epoch or workload")
    return Identity(
        slug,
        device_id,
        Epoch(int(number)),
        kind,
        labels.get(names.CLASS, ""),
        notes.get(names.SPEC_HASH, ""),
        tuple(notes.get(names.API, "").split()),
    )


def labels_of(thing: KubernetesObject) -> Mapping[str, str]:
    """The labels of an object or a pod."""
    return thing["metadata"].get("labels") or {}


def time_of(text: str | None) -> float:
    """Unix seconds of a timestamp; 0 if there is none or it is not valid."""
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


@dataclass(frozen=True, slots=True)
class _Owner:
    """The Deployment or StatefulSet of a device."""

    who: Identity
    thing: KubernetesObject

    @property
    def created(self) -> float:
        return _created(self.thing)

    def keeps(self, epoch: Epoch) -> bool:
        """Whether it keeps a pod of this epoch running."""
        return self.who.epoch == epoch and not _is_leaving(self.thing)


class _Pods:
    """The pods of one epoch of a device."""

    def __init__(self, pods: Sequence[KubernetesObject]) -> None:
        self.all = pods
        self.live = [pod for pod in pods if _phase(pod) not in _ENDED]
        """Those that have not ended."""
        self.active = [pod for pod in self.live if not _is_leaving(pod)]
        """Those that have not ended and are not being stopped."""
        ended = (pod for pod in pods if _phase(pod) in _ENDED)
        self.last_ended = max(ended, key=_created, default=None)


_Key = tuple[Slug, str, Kind]
"""Device, namespace and kind of workload."""


def placements(
    objects: Iterable[KubernetesObject], pods: Iterable[KubernetesObject], now: WallTime
) -> dict[Slug, tuple[Placement, ...]]:
    """All placements. `objects`: Deployments and StatefulSets, of which metadata is enough. Objects and pods with
    inconsistent labels are left out."""
    owners = {key: _Owner(who, thing) for key, who, thing in _identified(objects)}
    epochs: dict[_Key, dict[Epoch, list[KubernetesObject]]] = defaultdict(dict)
    identities: dict[tuple[_Key, Epoch], Identity] = {}
    for key, owner in owners.items():
        epochs[key][owner.who.epoch] = []
        identities[key, owner.who.epoch] = owner.who
    with_pods: set[tuple[_Key, Epoch]] = set()
    for key, who, pod in _identified(pods):
        epochs[key].setdefault(who.epoch, []).append(pod)
        if (key, who.epoch) not in with_pods:  # a pod is newer evidence than its owner
            with_pods.add((key, who.epoch))
            identities[key, who.epoch] = who
    return by_device(
        _placement(identities[key, epoch], key[1], owners.get(key), _Pods(some), now)
        for key, by_epoch in epochs.items()
        for epoch, some in by_epoch.items()
    )


def _identified(
    things: Iterable[KubernetesObject],
) -> Iterator[tuple[_Key, Identity, KubernetesObject]]:
    for thing in things:
        try:
            who = identity(thing)
        except UserError:
            continue
        yield (who.slug, thing["metadata"]["namespace"], who.kind), who, thing


def _placement(
    who: Identity, namespace: str, owner: _Owner | None, pods: _Pods, now: WallTime
) -> Placement:
    newest = max(pods.all, key=_created, default=None)
    state, reason = _state(who, owner, pods, now)
    # A pod that is being replaced does not count, so that its successor can be accepted.
    holding = pods.active or pods.live
    created = [_created(pod) for pod in pods.all]
    if owner is not None:
        created.append(owner.created)
    return Placement(
        slug=who.slug,
        device_id=who.device_id,
        epoch=who.epoch,
        agent_class=who.agent_class,
        spec_hash=who.spec_hash,
        state=state,
        ref=str(Ref(namespace, who.kind, names.name_of(who.slug), who.epoch)),
        instances=tuple(sorted(pod["metadata"]["uid"] for pod in holding)),
        node=_node(newest) if newest else "",
        restarts=max(0, len(pods.all) - 1) + (_restarts(newest) if newest else 0),
        reason=reason,
        created_at=WallTime(min(created)),
        ready=_ready(max(pods.active, key=_created)) if pods.active else None,
        waits_since=WallTime(max(created)),
        queued=not any(map(_node, pods.active)),
        api=who.api,
    )


def _state(
    who: Identity, owner: _Owner | None, pods: _Pods, now: WallTime
) -> tuple[PlacementState, str]:
    if who.kind != "pod" and (owner is None or not owner.keeps(who.epoch)):
        return _state_without_owner(owner, who.epoch, pods, now)
    if pods.active:
        return pod_state(max(pods.active, key=_created))
    if pods.live:
        pod = max(pods.live, key=_created)
        if is_lost(pod, now):
            return PlacementState.LOST, _lost(pod)
        state = PlacementState.STOPPING if who.kind == "pod" else PlacementState.RESTARTING
        return state, _why_leaving(pod)
    ended = pods.last_ended
    if who.kind == "pod":
        return PlacementState.DEAD, ending(ended) if ended else "gone"
    if ended is not None:
        return PlacementState.RESTARTING, f"{ending(ended)}; its replacement is being started"
    return PlacementState.PENDING, _why_no_pod(owner.thing if owner else None)


def _state_without_owner(
    owner: _Owner | None, epoch: Epoch, pods: _Pods, now: WallTime
) -> tuple[PlacementState, str]:
    """Of pods whose object is gone, is being deleted, or is at another epoch."""
    live = pods.live
    lost = next((pod for pod in live if is_lost(pod, now)), None)
    if lost is not None:
        return PlacementState.LOST, _lost(lost)
    if live and owner is not None and owner.who.epoch != epoch:
        return PlacementState.STOPPING, f"is being replaced by epoch {owner.who.epoch}"
    if owner is not None and owner.who.epoch == epoch:
        return PlacementState.STOPPING, "stop requested"
    if not live:
        return PlacementState.DEAD, ending(pods.last_ended) if pods.last_ended else "gone"
    if pods.active:
        # Its object was deleted, and the garbage collector will delete the pod.
        return PlacementState.STOPPING, "its object is gone"
    return PlacementState.STOPPING, _why_leaving(live[0])


def pod_state(pod: KubernetesObject) -> tuple[PlacementState, str]:
    """State and reason of a pod that has not ended and is not being stopped."""
    scheduled = _condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        return PlacementState.PENDING, f"no node can run it: {scheduled.get('message', '')}"[:300]
    if not _node(pod):
        return PlacementState.PENDING, "waiting for the scheduler"
    if _is_cut_off(pod):
        return PlacementState.LOST, _lost(pod)
    for status in _container_statuses(pod):
        if found := _container_state(status):
            return found
    if _phase(pod) == "Running":
        return PlacementState.RUNNING, ""
    return PlacementState.STARTING, ""


def _container_state(status: ContainerStatus) -> tuple[PlacementState, str] | None:
    """State and reason of a container that does not run; None for one that runs."""
    state = status.get("state") or {}
    waiting: Waiting = state.get("waiting") or {}
    reason = waiting.get("reason", "")
    if reason in _IMAGE:
        return PlacementState.STARTING, f"{reason}: {waiting.get('message', '')}"[:300]
    if reason in _FAULTS:
        return PlacementState.RESTARTING, _fault(status, waiting)
    if "terminated" in state:
        return PlacementState.RESTARTING, _exit(state["terminated"])
    if "running" in state:
        return None
    started_before = status.get("restartCount")
    return (
        PlacementState.RESTARTING if started_before else PlacementState.STARTING,
        waiting.get("message") or reason,
    )


def is_lost(pod: KubernetesObject, now: WallTime) -> bool:
    """Whether the node of a pod does not answer, so that the process of the pod may still run."""
    if not _node(pod):
        return False
    overdue = time_of(pod["metadata"].get("deletionTimestamp"))
    return _is_cut_off(pod) or bool(overdue and now - overdue > OVERDUE_S)


def key_of(thing: KubernetesObject) -> tuple[str, str]:
    """The namespace and the slug of an object or a pod."""
    return thing["metadata"]["namespace"], labels_of(thing).get(names.SLUG, "")


def is_settled(objects: Iterable[KubernetesObject], pods: Collection[KubernetesObject]) -> bool:
    """Whether these placements cannot change merely because time passes: no pod can become overdue, and no object
    is without a pod, so that its status would be read after a while."""
    with_pod = {key_of(pod) for pod in pods}
    return not any(map(_is_leaving, pods)) and all(key_of(one) in with_pod for one in objects)


def is_unschedulable(pod: KubernetesObject) -> bool:
    scheduled = _condition(pod, "PodScheduled")
    return (
        scheduled is not None
        and scheduled["status"] == "False"
        and scheduled.get("reason") == "Unschedulable"
    )


def confirms_pod(kind: str, pod: KubernetesObject) -> bool:
    """Whether an event only confirms a requested start: the pod is created, placed or runs."""
    if kind == "DELETED" or _is_leaving(pod) or _phase(pod) in _ENDED:
        return False
    scheduled = _condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        return True  # a pod without a node needs no action either
    return pod_state(pod)[0] in {
        PlacementState.PENDING,
        PlacementState.STARTING,
        PlacementState.RUNNING,
    } and not _restarts(pod)


def _is_cut_off(pod: KubernetesObject) -> bool:
    """Whether the kubelet last reported ready containers, but the node controller has marked the pod as not ready.
    It marks the pods of a node that has stopped reporting in this way."""
    if (pod.get("spec") or {}).get("readinessGates"):
        return False  # another controller may have marked a healthy pod as not ready
    ready, containers = _condition(pod, "Ready"), _condition(pod, "ContainersReady")
    if ready is None or containers is None:
        return False
    return ready["status"] == "False" and containers["status"] == "True"


def _lost(pod: KubernetesObject) -> str:
    return f"node {_node(pod)} does not answer; its process may still run"


def _why_leaving(pod: KubernetesObject) -> str:
    moved = _condition(pod, "DisruptionTarget")
    if moved is not None and moved["status"] == "True":
        return f"is being moved: {moved.get('message') or moved.get('reason', '')}"[:300]
    return "stop requested"


def ending(pod: KubernetesObject) -> str:
    """Why a pod has ended."""
    status = pod.get("status") or {}
    if status.get("reason") or status.get("message"):
        return f"{status.get('reason', '')}: {status.get('message', '')}".strip(": ")[:300]
    for one in _container_statuses(pod):
        if done := (one.get("state") or {}).get("terminated"):
            return _exit(done)
    return f"the pod has ended ({_phase(pod)})"


def _exit(done: Terminated) -> str:
    reason, code = done.get("reason", ""), done.get("exitCode", "?")
    if reason == "OOMKilled":
        return f"OOMKilled: it used more memory than its limit (exit code {code})"
    return f"exit code {code}" + (f" ({reason})" if reason and reason != "Error" else "")


def _fault(status: ContainerStatus, waiting: Waiting) -> str:
    last = (status.get("lastState") or {}).get("terminated")
    reason = f"{waiting['reason']}: {waiting.get('message', '')}".strip(": ")
    return (f"{_exit(last)}; {reason}" if last else reason)[:300]


def _why_no_pod(owner: KubernetesObject | None) -> str:
    """Why an object has no pod."""
    failure = None if owner is None else _condition(owner, "ReplicaFailure")
    if failure is not None and failure["status"] == "True":
        return f"its pod cannot be created: {failure.get('message', '')}"[:300]
    return "waiting for its pod"


def _condition(thing: KubernetesObject, kind: str) -> Condition | None:
    conditions = (thing.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind), None)


def _container_statuses(pod: KubernetesObject) -> Sequence[ContainerStatus]:
    return (pod.get("status") or {}).get("containerStatuses") or []


def _node(pod: KubernetesObject) -> str:
    """Name of the node of a pod; "" if it has none yet."""
    return (pod.get("spec") or {}).get("nodeName", "")


def _phase(pod: KubernetesObject) -> str:
    return (pod.get("status") or {}).get("phase", "Pending")


def _is_leaving(thing: KubernetesObject) -> bool:
    return bool(thing["metadata"].get("deletionTimestamp"))


def _created(thing: KubernetesObject) -> float:
    return time_of(thing["metadata"].get("creationTimestamp"))


def _ready(pod: KubernetesObject) -> bool | None:
    """Result of the readiness probe; None for a pod without one, which is ready at once."""
    probed = [one for one in pod["spec"].get("containers") or [] if one.get("readinessProbe")]
    ready = _condition(pod, "Ready")
    return ready is not None and ready["status"] == "True" if probed else None


def _restarts(pod: KubernetesObject) -> int:
    return sum(one.get("restartCount", 0) for one in _container_statuses(pod))
