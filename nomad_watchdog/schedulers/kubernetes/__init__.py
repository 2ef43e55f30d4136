"""The backend `kubernetes`: one object per device, named by its slug.

By default it is a Deployment. A class can select a StatefulSet or a bare Pod (docs/kubernetes.md).
Only the lists of the API server decide; its watches are hints.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from nomad_watchdog.clients.kubernetes import KubernetesAccess, KubernetesClient, Listed
from nomad_watchdog.clients.kubernetes_objects import KubernetesObject, PodSpec
from nomad_watchdog.clock import Clock, SystemClock
from nomad_watchdog.errors import (
    ConflictError,
    StaleError,
    TerminalError,
    TransientError,
    UserError,
    WatchdogError,
)
from nomad_watchdog.host_pressure import HostUsage
from nomad_watchdog.ids import Shard, Slug, shard_of
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement
from nomad_watchdog.schedulers import Capabilities, Capacity, Hint, Snapshot, named
from nomad_watchdog.schedulers.kubernetes import _pods, _view, _watch, names
from nomad_watchdog.schedulers.kubernetes import objects as _objects
from nomad_watchdog.schedulers.kubernetes._budgets import PodBudgets, bare_pods
from nomad_watchdog.schedulers.kubernetes._nodes import Cordons, open_nodes
from nomad_watchdog.schedulers.kubernetes._secrets import AgentSecret, secret_name
from nomad_watchdog.schedulers.kubernetes._unchanged import ChangeProbe
from nomad_watchdog.schedulers.kubernetes._usage import read_usage
from nomad_watchdog.schedulers.kubernetes.names import Kind, Ref
from nomad_watchdog.schedulers.kubernetes.namespaces import remember_namespaces
from nomad_watchdog.schedulers.vanished import Vanished

log = logging.getLogger(__name__)

_FEW: Final = 64
"""Maximum number of slugs in one selector; for more the full list is read."""
_TRIES: Final = 5
_PAUSE_S: Final = 0.1
_WITHOUT_POD_S: Final = 3.0
"""Age of an object without a pod from which on its status is read, which has the reason."""
_MAX_WITHOUT_POD: Final = 8


class KubernetesScheduler:
    """`namespaces`: number of namespaces that devices are spread over; the first is `namespace`, the others have
    the suffix -1, -2, … `blocked_limit`: number of unschedulable pods from which on there is no room. `leave_cordoned`:
    pods are moved off cordoned nodes, so that a drain need not evict bare ones."""

    name = "kubernetes"

    def __init__(  # noqa: PLR0913  # keyword settings of an entry point; each has a default
        self,
        *,
        settings: KubernetesAccess | None = None,
        namespace: str = "",
        namespaces: int = 1,
        shards: int = 1,
        installation: str = "",
        client: KubernetesClient | None = None,
        blocked_limit: int = 10,
        leave_cordoned: bool = False,
        clock: Clock | None = None,
    ) -> None:
        if namespaces < 1 or shards < 1:
            raise UserError(
                f"namespaces is {namespaces} and shards is {shards}; both must be at least 1"
            )
        self.capabilities = Capabilities(replaces_in_place=True, steers=True)
        self._clock = clock or SystemClock()
        chosen = settings or (client.settings if client else KubernetesAccess.discover())
        self._first = names.check_namespace(namespace or chosen.namespace or names.DOMAIN)
        self._client = client or KubernetesClient(chosen, self._clock)
        self._spread = self._known = namespaces
        self._shards = shards
        self._installation = names.label(installation, "installation")
        self._blocked_limit = blocked_limit
        self._selector = f"{names.INSTALLATION}={self._installation},{names.MANAGED}={names.DOMAIN}"
        self._built: dict[tuple[str, str], _objects.Built] = {}
        self._probe = ChangeProbe(self._client, self._selector)
        self._cordons = Cordons(self._client)
        self._budgets = PodBudgets(
            self._client, self._installation, self._clock, are_moved=leave_cordoned
        )
        self._memory = Vanished()
        self._index = 0
        self._listed = False

    @staticmethod
    def check_spec(spec: AgentSpec) -> None:
        """Raises UserError for an invalid template or variable."""
        _objects.build(spec)

    async def prepare(
        self,
        specs: Collection[AgentSpec],
        *,
        shards: Collection[Shard] | None = None,  # only for the budgets: classes have no objects
        trials: Collection[AgentSpec] = (),
    ) -> Mapping[str, str]:
        built: dict[tuple[str, str], _objects.Built] = {}
        refused: dict[str, str] = {}
        for name, spec in named(specs, trials):
            try:
                built[spec.agent_class, spec.spec_hash] = _objects.build(spec)
            except UserError as error:
                refused[name] = str(error)
        known = await remember_namespaces(self._client, self._first, self._spread)
        if known != self._known:
            self._probe.forget()  # a namespace was added that has not been listed
        self._known, self._built = known, built
        if shards is None or 0 in shards:
            await self._budgets.update()
        return refused

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        with self._probe.writing():
            built = self._built.get((spec.agent_class, spec.spec_hash))
            if built is None:
                built = self._built[spec.agent_class, spec.spec_hash] = _objects.build(spec)
            ref = self._home(record.slug, built.kind, epoch)
            if moved := await self._move(record.slug, ref):
                return moved
            labels = _objects.labels_of(
                record, epoch, spec, kind=built.kind,
                shard=shard_of(record.slug, self._shards), installation=self._installation,
            )  # fmt: skip
            document, credential = _objects.document_of(record, epoch, spec)
            own = secret_name(ref, epoch) if credential else ""
            secret_body = _objects.token_secret(own, labels, credential) if own else None
            secret = AgentSecret(self._client, ref, secret_body)
            body = _objects.workload(
                built, record, spec, labels=labels, document=document, secret=own or built.token_secret
            )  # fmt: skip
            try:
                return await self._place(ref, body, spec, secret)
            except TransientError:
                raise  # the next attempt finds the Secret
            except WatchdogError:
                with suppress(WatchdogError):  # report the first error
                    await secret.delete()
                raise

    async def _place(
        self, ref: Ref, body: KubernetesObject, spec: AgentSpec, secret: AgentSecret
    ) -> int:
        found: KubernetesObject | None = None  # most objects are new: read only after a conflict
        for attempt in range(_TRIES):
            if attempt > 1:  # a controller writes the status of a new object several times in a row
                await asyncio.sleep(random.uniform(0.5, 1.0) * _PAUSE_S * (attempt - 1))  # noqa: S311  # jitter
            if attempt:
                found = await self._client.find(ref.path, metadata=True)
            if found is not None:
                self._check_owner(found, ref)
                who = _view.identity(found)
                if who.epoch == ref.epoch:
                    await secret.set_owner(body, found)
                    return _view.version_of(found)
                if who.epoch > ref.epoch:
                    await secret.delete(any_writer=True)
                    raise ConflictError(f"{who.slug} is at epoch {who.epoch}, not {ref.epoch}")
                if ref.kind == "pod":
                    # The spec of a pod cannot be changed: once it is gone, ensure is called again.
                    await secret.delete()
                    return await self._delete(found, ref, spec.kill_timeout_s)
            try:
                # before the workload: without its Secret the pod would not start
                await secret.put(new=not attempt)
                made = await self._client.apply(ref.path, _objects.expecting(body, found))
            except ConflictError:
                continue
            await secret.set_owner(body, made)
            if found is not None:
                await secret.delete_earlier(who.epoch)
            return _view.version_of(made)
        raise TransientError(f"{ref} was changed by another writer in each of {_TRIES} attempts")

    async def retire(self, placement: Placement, grace_s: float) -> None:
        with self._probe.writing():
            ref = Ref.parse(placement.ref)
            for _ in range(_TRIES):
                found = await self._client.find(ref.path, metadata=True)
                try:
                    if found is not None and _view.epoch_of(found) == ref.epoch:
                        self._check_installation(found, ref)
                        await self._delete(found, ref, grace_s)
                    elif ref.kind != "pod":
                        await self._delete_pods(placement, ref, grace_s)
                except ConflictError:
                    continue
                return
            raise TransientError(
                f"{ref} was changed by another writer in each of {_TRIES} attempts"
            )

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        if only is not None and len(only) <= _FEW and self._listed:
            return await self._read(frozenset(only))
        whole = await self._read(None)
        return whole if only is None else whole.part(only)

    async def unchanged_since(self, snapshot: Snapshot) -> bool:
        if any(one.is_last for one in snapshot.closed_hosts.values()):
            return False  # another node may take agents now
        return await self._probe.unchanged_since(snapshot)

    async def open_hosts(self) -> frozenset[str] | None:
        """As `schedulers.open_hosts`; None without the right to list nodes."""
        return await open_nodes(self._client, self._pod_specs())

    async def host_usage(self, hosts: Collection[str]) -> Mapping[str, HostUsage]:
        """As `schedulers.host_usage`."""
        return await read_usage(self._client, hosts)

    def watch(self) -> AsyncIterator[Hint]:
        return _watch.hints(self._client, self._namespaces, self._selector, self._cordons)

    async def capacity(self) -> Capacity:
        unplaced = "status.phase=Pending,spec.nodeName="
        lists = await asyncio.gather(
            *(
                self._client.list(
                    names.collection(space, "pod"), labels=self._selector, fields=unplaced
                )
                for space in self._namespaces()
            )
        )
        pods = (pod for found in lists for pod in found.items)
        reasons = [_pods.pod_state(pod)[1] for pod in pods if _pods.is_unschedulable(pod)]
        return Capacity.beside(reasons, self._blocked_limit)

    async def sweep(self, dead: Collection[Placement]) -> int:
        with self._probe.writing():
            done = 0
            for one in dead:
                ref = Ref.parse(one.ref)
                found = await self._client.list(
                    names.collection(ref.namespace, "pod"),
                    labels=f"{self._selector},{names.SLUG}={one.slug},{names.EPOCH}={one.epoch}",
                )
                for pod in found.items:
                    meta = pod["metadata"]
                    if (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded"):
                        path = f"{names.collection(ref.namespace, 'pod')}/{meta['name']}"
                        done += await self._client.delete(path, uid=meta["uid"])
            return done

    async def close(self) -> None:
        await self._client.close()

    def _pod_specs(self) -> list[PodSpec]:
        return [one.pod["spec"] for one in self._built.values()]

    def _namespaces(self) -> list[str]:
        return [names.namespace_of(self._first, number) for number in range(self._known)]

    def _home(self, slug: Slug, kind: Kind, epoch: Epoch) -> Ref:
        namespace = names.namespace_of(self._first, shard_of(slug, self._spread))
        return Ref(namespace, kind, names.name_of(slug), epoch)

    async def _move(self, slug: Slug, home: Ref) -> int:
        """Stop a device's agent in another kind of workload or another namespace. It must be gone before the next
        one is created. Returns the index of the stop, 0 when there was none."""
        for text in self._memory.live(slug):
            ref = Ref.parse(text)
            if (ref.namespace, ref.kind) == (home.namespace, home.kind):
                continue
            found = await self._client.find(ref.path, metadata=True)
            if found is not None:
                self._check_installation(found, ref)
                return await self._delete(found, ref, None)
        return 0

    async def _delete(self, found: KubernetesObject, ref: Ref, grace_s: float | None) -> int:
        """Delete exactly this object, in the foreground: it exists until its pod is gone."""
        meta = found["metadata"]
        pod = ref.kind == "pod"
        if not meta.get("deletionTimestamp"):
            await self._client.delete(
                ref.path,
                grace_s=math.ceil(grace_s) if pod and grace_s is not None else None,
                uid=meta["uid"],
                version="" if pod else meta["resourceVersion"],
                propagation="" if pod else "Foreground",
            )
        return _view.version_of(found)

    async def _delete_pods(self, placement: Placement, ref: Ref, grace_s: float) -> None:
        """Delete the pods of an epoch whose object is gone or at another epoch."""
        path = names.collection(ref.namespace, "pod")
        mine = f"{self._selector},{names.SLUG}={placement.slug},{names.EPOCH}={ref.epoch}"
        found = await self._client.list(path, labels=mine)
        for pod in found.items:
            meta = pod["metadata"]
            if not meta.get("deletionTimestamp"):
                at = f"{path}/{meta['name']}"
                await self._client.delete(at, grace_s=math.ceil(grace_s), uid=meta["uid"])

    def _check_owner(self, found: KubernetesObject, ref: Ref) -> None:
        self._check_installation(found, ref)
        if found["metadata"].get("deletionTimestamp"):
            raise TransientError(f"{ref.path} is still being shut down", retry_after_s=1.0)

    def _check_installation(self, found: KubernetesObject, ref: Ref) -> None:
        labels = _view.labels_of(found)
        if labels.get(names.MANAGED) != names.DOMAIN:
            raise TerminalError(f"{ref.path} exists and was not created by nomad-watchdog")
        owner = labels.get(names.INSTALLATION, "")
        if owner != self._installation:
            raise TerminalError(
                f"{ref.path} belongs to installation {owner!r}: choose another namespace"
            )

    async def _read(self, only: frozenset[Slug] | None) -> Snapshot:
        before, began = self._index, self._probe.begin_read()
        labels = self._selector
        if only is not None:
            labels += f",{names.SLUG} in ({','.join(sorted(only))})"
        spaces = self._namespaces()
        kinds: tuple[Kind, ...] = ("deployment", "statefulset")
        above = [names.collection(space, kind) for space in spaces for kind in kinds]
        below = [names.collection(space, "pod") for space in spaces]
        # Pods after their objects: an object is older than its pods.
        owners = await asyncio.gather(
            *(self._client.list(path, labels=labels, metadata=True) for path in above)
        )
        pods = await asyncio.gather(*(self._client.list(path, labels=labels) for path in below))
        index = min(int(one.version) for one in (*owners, *pods))
        if index < before:
            self._index = 0
            raise StaleError(
                f"the resource version of kubernetes went back from {before} to {index}"
            )
        objects = await self._with_status(owners, pods)
        all_pods = _flat(pods)
        found = _view.placements(objects, all_pods, self._clock.wall())
        await self._check_vanished(found, only)
        self._memory.remember(found, only)
        snapshot = Snapshot(found, index, only)
        if only is None:
            used = {one.node for some in found.values() for one in some}
            closed = await self._cordons.read(used, self._pod_specs())
            snapshot = replace(snapshot, closed_hosts=closed)
            self._index, self._listed, self._budgets.pods = index, True, bare_pods(all_pods)
            lists = zip((*above, *below), (*owners, *pods), strict=True)
            versions = {path: one.version for path, one in lists}
            settled = _view.is_settled(objects, all_pods)
            self._probe.end_read(began, snapshot if settled else None, versions)
        return snapshot

    async def _check_vanished(
        self, found: Mapping[Slug, Sequence[Placement]], only: frozenset[Slug] | None
    ) -> None:
        """Raise StaleError when a list lacks an object that the API server has (S7)."""
        listed = {one.ref for some in found.values() for one in some}
        refs = [Ref.parse(text) for text in self._memory.vanished(listed, only)]
        answers = await asyncio.gather(
            *(self._client.find(ref.path, metadata=True) for ref in refs)
        )
        for ref, there in zip(refs, answers, strict=True):
            if there is None or _view.epoch_of(there) != ref.epoch:
                continue
            if _view.labels_of(there).get(names.INSTALLATION) == self._installation:
                raise StaleError(f"the lists of kubernetes lack {ref.path}, which exists")

    async def _with_status(
        self, owners: Sequence[Listed], pods: Sequence[Listed]
    ) -> list[KubernetesObject]:
        """The objects. Those that have been without a pod for a while have their status, with the reason."""
        objects = _flat(owners)
        placed = {_view.key_of(pod) for pod in _flat(pods)}
        now = self._clock.wall()
        without_pod = [
            one
            for one in objects
            if _view.key_of(one) not in placed
            and now - _pods.time_of(one["metadata"].get("creationTimestamp")) > _WITHOUT_POD_S
        ][:_MAX_WITHOUT_POD]
        paths = [path for one in without_pod if (path := _view.path_of(one))]
        found = await asyncio.gather(*(self._client.find(path) for path in paths))
        whole = {one["metadata"]["uid"]: one for one in found if one is not None}
        return [whole.get(one["metadata"]["uid"], one) for one in objects]


def _flat(lists: Sequence[Listed]) -> list[KubernetesObject]:
    return [one for found in lists for one in found.items]
