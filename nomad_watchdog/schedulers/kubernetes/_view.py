"""Placements from the lists of the API server. Pure: values in, values out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from watchdog_agent.runtime.parsing import whole

from nomad_watchdog.clients.kubernetes_objects import KubernetesObject
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, Slug, parse_device_id, slug_of
from nomad_watchdog.model import Epoch, Placement, PlacementState, WallTime
from nomad_watchdog.schedulers import by_device
from nomad_watchdog.schedulers.kubernetes import _pods, names
from nomad_watchdog.schedulers.kubernetes.names import KINDS, Kind, Ref


@dataclass(frozen=True, slots=True)
class ObjectIdentity:
    """The device, epoch and spec of an object or a pod, from its labels and annotations."""

    slug: Slug
    device_id: DeviceId
    epoch: Epoch
    kind: Kind
    agent_class: str
    spec_hash: str
    api: tuple[str, ...] = ()


def identity(thing: KubernetesObject) -> ObjectIdentity:
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
    return ObjectIdentity(
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


@dataclass(frozen=True, slots=True)
class _Owner:
    """The Deployment or StatefulSet of a device."""

    who: ObjectIdentity
    thing: KubernetesObject

    @property
    def created(self) -> float:
        return _pods.created_at(self.thing)

    def keeps(self, epoch: Epoch) -> bool:
        """Whether it keeps a pod of this epoch running."""
        return self.who.epoch == epoch and not _pods.is_leaving(self.thing)


class _Pods:
    """The pods of one epoch of a device."""

    def __init__(self, pods: Sequence[KubernetesObject]) -> None:
        self.all = pods
        self.live = [pod for pod in pods if _pods.phase(pod) not in _pods.ENDED]
        """Those that have not ended."""
        self.active = [pod for pod in self.live if not _pods.is_leaving(pod)]
        """Those that have not ended and are not being stopped."""
        ended = (pod for pod in pods if _pods.phase(pod) in _pods.ENDED)
        self.last_ended = max(ended, key=_pods.created_at, default=None)


_Key = tuple[Slug, str, Kind]
"""Device, namespace and kind of workload."""


def placements(
    objects: Iterable[KubernetesObject], pods: Iterable[KubernetesObject], now: WallTime
) -> dict[Slug, tuple[Placement, ...]]:
    """All placements. `objects`: Deployments and StatefulSets, of which metadata is enough. Objects and pods with
    inconsistent labels are left out."""
    owners = {key: _Owner(who, thing) for key, who, thing in _identified(objects)}
    epochs: dict[_Key, dict[Epoch, list[KubernetesObject]]] = defaultdict(dict)
    identities: dict[tuple[_Key, Epoch], ObjectIdentity] = {}
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
) -> Iterator[tuple[_Key, ObjectIdentity, KubernetesObject]]:
    for thing in things:
        try:
            who = identity(thing)
        except UserError:
            continue
        yield (who.slug, thing["metadata"]["namespace"], who.kind), who, thing


def _placement(
    who: ObjectIdentity, namespace: str, owner: _Owner | None, pods: _Pods, now: WallTime
) -> Placement:
    newest = max(pods.all, key=_pods.created_at, default=None)
    state, reason = _state(who, owner, pods, now)
    # A pod that is being replaced does not count, so that its successor can be accepted.
    holding = pods.active or pods.live
    created = [_pods.created_at(pod) for pod in pods.all]
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
        node=_pods.node_of(newest) if newest else "",
        restarts=max(0, len(pods.all) - 1) + (_pods.restarts_of(newest) if newest else 0),
        reason=reason,
        created_at=WallTime(min(created)),
        ready=_pods.is_ready(max(pods.active, key=_pods.created_at)) if pods.active else None,
        waits_since=WallTime(max(created)),
        queued=not any(map(_pods.node_of, pods.active)),
        api=who.api,
    )


def _state(
    who: ObjectIdentity, owner: _Owner | None, pods: _Pods, now: WallTime
) -> tuple[PlacementState, str]:
    if who.kind != "pod" and (owner is None or not owner.keeps(who.epoch)):
        return _state_without_owner(owner, who.epoch, pods, now)
    if pods.active:
        return _pods.pod_state(max(pods.active, key=_pods.created_at))
    if pods.live:
        pod = max(pods.live, key=_pods.created_at)
        if _pods.is_lost(pod, now):
            return PlacementState.LOST, _pods.lost_reason(pod)
        state = PlacementState.STOPPING if who.kind == "pod" else PlacementState.RESTARTING
        return state, _pods.leaving_reason(pod)
    ended = pods.last_ended
    if who.kind == "pod":
        return PlacementState.DEAD, _pods.ending(ended) if ended else "gone"
    if ended is not None:
        return PlacementState.RESTARTING, f"{_pods.ending(ended)}; its replacement is being started"
    return PlacementState.PENDING, _why_no_pod(owner.thing if owner else None)


def _state_without_owner(
    owner: _Owner | None, epoch: Epoch, pods: _Pods, now: WallTime
) -> tuple[PlacementState, str]:
    """Of pods whose object is gone, is being deleted, or is at another epoch."""
    live = pods.live
    lost = next((pod for pod in live if _pods.is_lost(pod, now)), None)
    if lost is not None:
        return PlacementState.LOST, _pods.lost_reason(lost)
    if live and owner is not None and owner.who.epoch != epoch:
        return PlacementState.STOPPING, f"is being replaced by epoch {owner.who.epoch}"
    if owner is not None and owner.who.epoch == epoch:
        return PlacementState.STOPPING, "stop requested"
    if not live:
        return PlacementState.DEAD, _pods.ending(pods.last_ended) if pods.last_ended else "gone"
    if pods.active:
        # Its object was deleted, and the garbage collector will delete the pod.
        return PlacementState.STOPPING, "its object is gone"
    return PlacementState.STOPPING, _pods.leaving_reason(live[0])


def key_of(thing: KubernetesObject) -> tuple[str, str]:
    """The namespace and the slug of an object or a pod."""
    return thing["metadata"]["namespace"], labels_of(thing).get(names.SLUG, "")


def path_of(thing: KubernetesObject) -> str:
    """The path of an object; "" if its labels are inconsistent."""
    meta = thing["metadata"]
    try:
        kind = identity(thing).kind
    except UserError:
        return ""
    return f"{names.collection(meta['namespace'], kind)}/{meta['name']}"


def is_settled(objects: Iterable[KubernetesObject], pods: Collection[KubernetesObject]) -> bool:
    """Whether these placements cannot change merely because time passes: no pod can become overdue, and no object
    is without a pod, so that its status would be read after a while."""
    with_pod = {key_of(pod) for pod in pods}
    return not any(map(_pods.is_leaving, pods)) and all(key_of(one) in with_pod for one in objects)


def _why_no_pod(owner: KubernetesObject | None) -> str:
    """Why an object has no pod."""
    failure = None if owner is None else _pods.condition(owner, "ReplicaFailure")
    if failure is not None and failure["status"] == "True":
        return f"its pod cannot be created: {failure.get('message', '')}"[:300]
    return "waiting for its pod"


def version_of(thing: KubernetesObject) -> int:
    return whole(thing["metadata"]["resourceVersion"])


def epoch_of(thing: KubernetesObject) -> int:
    """The epoch of an object; -1 if it has none."""
    try:
        return whole(labels_of(thing).get(names.EPOCH, ""))
    except ValueError:
        return -1
