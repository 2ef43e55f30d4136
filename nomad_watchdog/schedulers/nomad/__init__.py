"""The backend `nomad`: agents on Nomad, in one of two strategies.

``dispatch``: each placement is a dispatched child of a parameterized parent job, one parent per class and shard.
``register``: each device has a service job, which is updated in place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from typing import Final, Literal

from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.clients.nomad_features import Feature
from nomad_watchdog.clients.nomad_rows import Dispatched, Job
from nomad_watchdog.clock import Clock, SystemClock
from nomad_watchdog.core.report_addresses import is_at
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    StaleError,
    TerminalError,
    TransientError,
    UnpreparedError,
    UserError,
    WatchdogError,
)
from nomad_watchdog.host_pressure import HostUsage
from nomad_watchdog.ids import Shard, Slug, shard_of
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement, PlacementState
from nomad_watchdog.schedulers import Capabilities, Capacity, Hint, Snapshot, agent_document, named
from nomad_watchdog.schedulers.nomad import jobs as _jobs
from nomad_watchdog.schedulers.nomad._names import JobNames
from nomad_watchdog.schedulers.nomad._snapshots import SnapshotReader
from nomad_watchdog.schedulers.nomad._steering import (
    ParentSteering,
    is_steered,
    steered_service,
    takers,
)
from nomad_watchdog.schedulers.nomad._usage import read_usage
from nomad_watchdog.schedulers.nomad._view import SOURCE, age, identity, unplaced
from nomad_watchdog.schedulers.nomad._watch import hints
from nomad_watchdog.schedulers.nomad.nodes import RIGHT, NodeList

log = logging.getLogger(__name__)

_TRIES: Final = 4


class NomadScheduler:
    """`blocked_limit`: number of our blocked evaluations from which on there is no room (children that cannot be
    placed cost the servers quadratic CPU). `drain`: as the setting `nomad.drain`; with "wait", Nomad moves the jobs of
    the strategy `register` itself."""

    name = "nomad"

    def __init__(  # noqa: PLR0913  # keyword settings of an entry point; each has a default
        self,
        *,
        settings: NomadAccess | None = None,
        strategy: Literal["dispatch", "register"] = "dispatch",
        shards: int = 1,
        installation: str = "",
        prefix: str = "device-watchdog",
        client: NomadClient | None = None,
        blocked_limit: int = 10,
        drain: Literal["move", "wait"] = "move",
        clock: Clock | None = None,
    ) -> None:
        if strategy not in ("dispatch", "register"):
            raise UserError(f"nomad strategy {strategy!r}: allowed are dispatch and register")
        if shards < 1:
            raise UserError(f"shards is {shards}; must be at least 1")
        self.capabilities = Capabilities(replaces_in_place=strategy == "register", steers=True)
        self._strategy = strategy
        self._shards = shards
        self._installation = installation
        self._names = JobNames(prefix, shards)
        self._client = client or NomadClient(settings or NomadAccess.from_env())
        self._blocked_limit = blocked_limit
        self._drain_moves = drain == "move"
        self._built: dict[tuple[str, str], Job] = {}
        self._trials: dict[str, str] = {}
        """Agent class → hash of its spec on trial."""
        self._nodes = NodeList(self._client)
        clock = clock or SystemClock()
        self._steering = ParentSteering(self._client, clock)
        self._reader = SnapshotReader(self._client, self._names, self._nodes, clock, installation)

    @staticmethod
    def check_spec(spec: AgentSpec) -> None:
        """Raises UserError for an invalid template or variable."""
        _jobs.template_of(spec)

    async def prepare(
        self,
        specs: Collection[AgentSpec],
        *,
        shards: Collection[Shard] | None = None,
        trials: Collection[AgentSpec] = (),
    ) -> Mapping[str, str]:
        await self._client.features(again=True)  # the servers may have been upgraded
        self._nodes.retry_denied()
        await self._reader.evaluate_forgotten()
        built: dict[tuple[str, str], Job] = {}
        refused: dict[str, str] = {}
        on_trial = {spec.agent_class: spec.spec_hash for spec in trials}
        for name, spec in named(specs, trials):
            try:
                built[spec.agent_class, spec.spec_hash] = await self._prepare_one(
                    spec, shards, on_trial
                )
            except DeniedError:
                raise  # the token lacks a right, and no class could be prepared with it
            except (UserError, TerminalError) as error:
                refused[name] = str(error)
        self._built, self._trials = built, on_trial
        self._steering.forget()
        return refused

    async def _prepare_one(
        self, spec: AgentSpec, shards: Collection[Shard] | None, on_trial: Mapping[str, str]
    ) -> Job:
        first = self._parent(spec, Shard(0), on_trial)
        job = await _jobs.build(self._client, spec, first, self._installation)
        if self._strategy == "dispatch":
            addresses = agent_document.api_of(spec)
            for shard in map(Shard, range(self._shards)):
                parent = self._parent(spec, shard, on_trial)
                self._names.parents.add(parent)
                if shards is None or shard in shards:
                    await self._register_parent(job, parent, addresses)
        return job

    def _parent(self, spec: AgentSpec, shard: Shard, on_trial: Mapping[str, str]) -> str:
        """The parent job of a spec. `on_trial`: agent class → hash of its spec on trial. Raises UserError for a class
        name that is not allowed."""
        usual = self._names.parent(spec.agent_class, shard)
        is_tried = on_trial.get(spec.agent_class) == spec.spec_hash
        return self._names.other(usual) if is_tried else usual

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        if self._strategy == "register":
            return await self._ensure_registered(record, epoch, spec)
        shard = shard_of(record.slug, self._shards)
        parent = self._parent(spec, shard, self._trials)
        if index := await self._index_of_other(parent, record.slug, epoch):
            return index
        built = self._built.get((spec.agent_class, spec.spec_hash))
        await self._steering.steer(parent, built, spec.avoid)
        meta = _jobs.meta(record, epoch, spec, shard)
        body = _jobs.dispatch_body(_jobs.payload(record, epoch, spec), meta)
        dispatched, index, failure = await self._dispatch(parent, body)
        features = await self._client.features()
        protected = features.has(Feature.RACE_SAFE_TOKENS) and features.has(Feature.ATOMIC_DISPATCH)
        if dispatched is not None and protected:
            return index
        index, children = await self._children(parent, record.slug, epoch)
        if not children:
            raise failure or StaleError(f"nomad lists no job of {record.slug} at epoch {epoch}")
        if protected:
            return index
        if await self._keep_oldest(parent, children, dispatched or {}, record.slug, epoch):
            # a plan that is based on this index must not see the stopped jobs as running
            index, _ = await self._children(parent, record.slug, epoch)
        return index

    async def _dispatch(
        self, parent: str, body: _jobs.Dispatch
    ) -> tuple[Dispatched | None, int, TransientError | None]:
        """The answer and its index, or why there is none. Raises UnpreparedError if the parent is missing."""
        try:
            answer = await self._client.dispatch(parent, body)
        except TransientError as error:
            return None, 0, error  # Nomad may have created the job nevertheless
        except (NotFoundError, TerminalError) as error:
            if _is_parent_missing(error):
                raise UnpreparedError(f"{error}; it is registered again soon") from error
            raise
        return answer.body, answer.index, None

    async def _index_of_other(self, parent: str, slug: Slug, epoch: Epoch) -> int:
        """The index at which this epoch is listed as a child of the other parent of its class; 0 = it is not.

        A token protects only among the children of one parent: the epoch may have been started with another spec,
        and the answer lost (S2)."""
        other = self._names.other(parent)
        if other not in self._names.parents:
            return 0
        index, children = await self._children(other, slug, epoch)
        return index if _unstopped(children) else 0

    async def _children(self, parent: str, slug: Slug, epoch: Epoch) -> tuple[int, list[Job]]:
        """The jobs of one epoch, the oldest first, and the index of the list."""
        params = {"prefix": f"{parent}/dispatch-{slug}-", "meta": "true"}
        found = await self._client.pages("/v1/jobs", "list-jobs", params)
        ours: list[Job] = [
            job for job in found.body if (job.get("Meta") or {}).get("epoch") == str(epoch)
        ]
        return found.index, sorted(ours, key=age)

    async def _keep_oldest(
        self, parent: str, children: list[Job], dispatched: Dispatched, slug: Slug, epoch: Epoch
    ) -> bool:
        """Leave only the oldest job of an epoch, evaluated, where Nomad's idempotency token does not protect
        against races (S2). Returns whether there were others.

        The planner keeps the oldest job as well, and no racing call ever stops it. The last call to list the
        jobs sees all of them, so no job is left over. A call stops its own job before it stops others: each of
        many racing calls then stops one job, instead of each stopping all."""
        oldest = children[0]
        if not dispatched.get("EvalID") and oldest.get("Status") == "pending":
            await self._client.evaluate(oldest["ID"])
        surplus = _unstopped(children[1:])
        if not surplus:
            return False
        if (own := dispatched.get("DispatchedJobID")) in surplus:
            await self._client.deregister(own)
            _, children = await self._children(parent, slug, epoch)
            surplus = _unstopped(children[1:])
        log.warning("agent started more than once", extra={"slug": slug})
        await asyncio.gather(*(self._client.deregister(ref) for ref in surplus))
        return True

    async def retire(self, placement: Placement, grace_s: float) -> None:  # noqa: ARG002  # Nomad takes kill_timeout from the job
        # no purge: the process of a purged job may keep running (GH-28242)
        await self._client.deregister(placement.ref)

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        return await self._reader.snapshot(only)

    async def unchanged_since(self, snapshot: Snapshot) -> bool:
        return await self._reader.unchanged_since(snapshot)

    async def open_hosts(self) -> frozenset[str] | None:
        """As `schedulers.open_hosts`; None without the right to read nodes."""
        try:
            found = await self._client.pages("/v1/nodes", RIGHT, {})
        except DeniedError:
            return None
        return takers(found.body, self._built.values())

    async def host_usage(self, hosts: Collection[str]) -> Mapping[str, HostUsage]:
        """As `schedulers.host_usage`."""
        return await read_usage(self._client, self._nodes.now, hosts)

    def watch(self) -> AsyncIterator[Hint]:
        return hints(self._client, self._names, self._nodes)

    async def capacity(self) -> Capacity:
        # not with `filter`: Nomad would evaluate the expression for every evaluation
        found = await self._client.pages("/v1/evaluations", "read-job", {"status": "blocked"})
        ours = {
            one["JobID"]: unplaced([one]) for one in found.body if self._names.is_ours(one["JobID"])
        }
        return Capacity.beside(ours.values(), self._blocked_limit)

    async def sweep(self, dead: Collection[Placement]) -> int:
        done = 0
        now = (await self.snapshot(only={one.slug for one in dead})).placements
        newest = {slug: max(one.epoch for one in found) for slug, found in now.items()}
        sure = {
            one.ref for found in now.values() for one in found if one.state is PlacementState.DEAD
        }
        for one in dead:
            # the newest job keeps its idempotency token in use, so a late dispatch cannot start its epoch again
            if one.ref not in sure or one.epoch >= newest[one.slug]:
                continue
            await self._client.deregister(one.ref, purge=True)
            done += 1
        return done

    async def close(self) -> None:
        await self._client.close()

    async def _register_parent(self, job: Job, job_id: str, addresses: Sequence[str]) -> None:
        """Register a parent unless there is one that differs only in the replica that agents are downloaded
        from, and that replica runs. Otherwise replicas would overwrite each other's parents forever.

        `addresses`: of the running replicas."""
        found = await self._client.job(job_id)
        if found is not None and not found.get("Stop"):
            if found.get("ParameterizedJob") is None:
                raise TerminalError(f"nomad job {job_id!r} exists and is not a parameterized job")
            meta, own_meta = found.get("Meta") or {}, job["Meta"] or {}
            owner = meta.get("installation", "")
            if owner != self._installation:
                raise TerminalError(
                    f"nomad job {job_id!r} belongs to installation {owner!r}: choose another prefix"
                )
            own, source = own_meta[SOURCE], meta.get(SOURCE, "")
            reachable = source == own or bool(own and is_at(source, addresses))
            is_same = meta.get("parent_hash") == own_meta["parent_hash"]
            if is_same and reachable and not is_steered(found, job):
                return
        await self._client.register({**job, "ID": job_id, "Name": job_id})
        log.info("parent job registered", extra={"job": job_id})

    async def _ensure_registered(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        parent = self._built.get((spec.agent_class, spec.spec_hash))
        if parent is None:
            parent = await _jobs.build(
                self._client, spec, self._names.parent(spec.agent_class, 0), self._installation
            )
            self._built[spec.agent_class, spec.spec_hash] = parent
        job_id = self._names.of_device(record.slug)
        meta = _jobs.meta(record, epoch, spec, shard_of(record.slug, self._shards))
        document = _jobs.payload(record, epoch, spec)
        job = _jobs.service_job(parent, job_id, document, meta, waits=self._drain_moves)
        job = steered_service(job, spec.avoid)
        for _ in range(_TRIES):
            found = await self._client.job(job_id)
            if found is not None:
                who = identity(found, self._installation)
                if who is None:
                    raise TerminalError(
                        f"nomad job {job_id!r} exists and does not belong to this installation"
                    )
                if who.epoch > epoch:
                    raise ConflictError(
                        f"{record.slug} is already at epoch {who.epoch}, not {epoch}"
                    )
                if who.epoch == epoch:
                    return int(found["JobModifyIndex"])
            try:
                return await self._client.register(
                    job, enforce=0 if found is None else int(found["JobModifyIndex"])
                )
            except ConflictError:
                continue
        raise TransientError(
            f"job {job_id} was changed by another writer in each of {_TRIES} attempts"
        )


def _is_parent_missing(error: WatchdogError) -> bool:
    """Whether a dispatch failed because its parent job is stopped or missing (Nomad answers 500 with these
    texts, and 404 from 1.8 on), or was registered by an older version."""
    text = str(error)
    causes = ("job not found", "is stopped", "unpermitted metadata")
    return isinstance(error, NotFoundError) or any(cause in text for cause in causes)


def _unstopped(jobs: Iterable[Job]) -> list[str]:
    return [job["ID"] for job in jobs if not job.get("Stop")]
