"""Agents on Nomad, in one of two strategies.

``dispatch``: each placement is a dispatched child of a parameterized parent job, one parent a class
(and shard). ``register``: each device has a service job of its own, updated in place.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final, Literal
from urllib.parse import quote

from nomad_watchdog.clients.nomad import Answer, NomadAccess, NomadClient
from nomad_watchdog.clients.nomad_features import Feature
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
from nomad_watchdog.ids import Shard, Slug, is_slug, shard_of
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement, PlacementState
from nomad_watchdog.schedulers import Capabilities, Capacity, Hint, Snapshot, agent_document
from nomad_watchdog.schedulers.nomad import jobs as _jobs
from nomad_watchdog.schedulers.nomad._list_check import unlisted
from nomad_watchdog.schedulers.nomad._view import (
    SECOND_LOOK_S,
    SOURCE,
    Row,
    age,
    identity,
    is_calm,
    looks_dead,
    placement,
    unevaluated,
    unplaced,
)
from nomad_watchdog.schedulers.nomad.nodes import NodeList
from nomad_watchdog.schedulers.vanished import Vanished

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
_FEW: Final = 24
"""Up to so many slugs are asked for one by one; for more the full list is cheaper."""
_AT_ONCE: Final = 8
_TRIES: Final = 4
_SLUG_LENGTH: Final = 53
_RECONNECT_MAX_S: Final = 30.0


class NomadScheduler:
    """The backend `nomad`. `blocked_limit`: with so many of our evaluations blocked there is no room
    (unplaceable children cost the servers quadratic CPU)."""

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
        clock: Clock | None = None,
    ) -> None:
        if strategy not in ("dispatch", "register"):
            raise UserError(f"nomad strategy {strategy!r}: allowed are dispatch and register")
        if not _NAME.fullmatch(prefix):
            raise UserError(f"nomad job prefix {prefix!r}: allowed are a-z, 0-9 and -, at most 63")
        if shards < 1:
            raise UserError(f"shards is {shards}; at least 1 is needed")
        self.capabilities = Capabilities(replaces_in_place=strategy == "register", drains=True)
        self._strategy = strategy
        self._shards = shards
        self._installation = installation
        self._prefix = prefix
        self._client = client or NomadClient(settings or NomadAccess.from_env())
        self._blocked_limit = blocked_limit
        self._clock = clock or SystemClock()
        self._built: dict[tuple[str, str], dict[str, Any]] = {}
        self._parents: set[str] = set()
        self._names: dict[tuple[str, int], str] = {}
        self._listed = False
        self._index = 0
        self._first_dead: dict[str, float] = {}
        self._unevaluated: dict[str, float] = {}
        """Jobs that no scheduler of Nomad's has looked at, and since when."""
        self._read: tuple[Snapshot, tuple[int, ...]] | None = None
        """The last whole snapshot, and the indexes of the tables that it was read from; None while it shows
        what a second look may show otherwise, with nothing new in Nomad."""
        self._memory = Vanished()
        self._nodes = NodeList(self._client)
        self.malformed = 0
        """Jobs in the last full snapshot that claim to be ours and make no sense."""

    @staticmethod
    def check_spec(spec: AgentSpec) -> None:
        """Raises UserError for a template, or variables, that won't do."""
        _jobs.template_of(spec)

    async def prepare(
        self, specs: Collection[AgentSpec], *, shards: Collection[Shard] | None = None
    ) -> Mapping[str, str]:
        await self._client.features(again=True)  # the servers may have been upgraded
        self._nodes.ask_again()
        await self._evaluate_forgotten()
        built: dict[tuple[str, str], dict[str, Any]] = {}
        refused: dict[str, str] = {}
        for spec in specs:
            try:
                built[spec.agent_class, spec.spec_hash] = await self._prepare_one(spec, shards)
            except DeniedError:
                raise  # the token lacks a right, and no class could be prepared with it
            except (UserError, TerminalError) as error:
                refused[spec.agent_class] = str(error)
        self._built = built
        return refused

    async def _prepare_one(
        self, spec: AgentSpec, shards: Collection[Shard] | None
    ) -> dict[str, Any]:
        job = await _jobs.build(
            self._client, spec, self._parent(spec.agent_class, 0), self._installation
        )
        if self._strategy == "dispatch":
            living = agent_document.api_of(spec)
            for shard in map(Shard, range(self._shards)):
                parent = self._parent(spec.agent_class, shard)
                self._parents.add(parent)
                if shards is None or shard in shards:
                    await self._register_parent(job, parent, living)
        return job

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        if self._strategy == "register":
            return await self._ensure_registered(record, epoch, spec)
        shard = shard_of(record.slug, self._shards)
        parent = self._parent(spec.agent_class, shard)
        told = _jobs.meta(record, epoch, spec, shard)
        body = _jobs.dispatch_body(_jobs.payload(record, epoch, spec), told)
        answer: Answer | None = None
        failure: TransientError | None = None
        try:
            answer = await self._client.dispatch(parent, body)
        except TransientError as error:
            failure = error  # it may have happened all the same
        except (NotFoundError, TerminalError) as error:
            if _is_parent_missing(error):
                raise UnpreparedError(f"{error}; it is registered again soon") from error
            raise
        features = await self._client.features()
        protected = features.has(Feature.RACE_SAFE_TOKENS) and features.has(Feature.ATOMIC_DISPATCH)
        if answer is not None and protected:
            return answer.index
        index, children = await self._children(parent, record.slug, epoch)
        if not children:
            raise failure or StaleError(f"nomad lists no job of {record.slug} at epoch {epoch}")
        if protected:
            return index
        if await self._only_the_oldest(parent, children, {} if answer is None else answer.body):
            # whoever plans by this index must not see the jobs that were stopped as running
            index, _ = await self._children(parent, record.slug, epoch)
        return index

    async def _children(self, parent: str, slug: Slug, epoch: Epoch) -> tuple[int, list[Row]]:
        """The jobs of one epoch, the oldest first, and the index of the list."""
        ask = {"prefix": f"{parent}/dispatch-{slug}-", "meta": "true"}
        found = await self._client.pages("/v1/jobs", "list-jobs", ask)
        ours = [job for job in found.body if (job.get("Meta") or {}).get("epoch") == str(epoch)]
        return found.index, sorted(ours, key=age)

    async def _only_the_oldest(
        self, parent: str, children: list[Row], answer: Mapping[str, Any]
    ) -> bool:
        """Leave one job of an epoch, evaluated, where Nomad's token does not protect against races (S2).
        Returns whether others were there.

        The planner keeps the oldest too, and no racer ever stops it. The last racer to list the jobs sees
        all of them, so that none is left over. A racer stops its own job before it looks for others: of
        many racers each then stops one, instead of all of them stopping all."""
        oldest = children[0]
        if not answer.get("EvalID") and oldest.get("Status") == "pending":
            await self._client.evaluate(oldest["ID"])
        surplus = _unstopped(children[1:])
        if not surplus:
            return False
        if (own := answer.get("DispatchedJobID")) in surplus:
            await self._client.deregister(own)
            who = oldest["Meta"]
            _, children = await self._children(parent, who["slug"], Epoch(int(who["epoch"])))
            surplus = _unstopped(children[1:])
        log.warning("agent started more than once", extra={"slug": oldest["Meta"]["slug"]})
        await asyncio.gather(*(self._client.deregister(ref) for ref in surplus))
        return True

    async def _evaluate_forgotten(self) -> None:
        """Have Nomad evaluate the jobs that a crashed server has left without an evaluation (L2)."""
        due_by = self._clock.monotonic() - SECOND_LOOK_S
        forgotten = [ref for ref, since in self._unevaluated.items() if since <= due_by]
        for ref in forgotten:
            with suppress(NotFoundError):
                await self._client.evaluate(ref)
            self._unevaluated.pop(ref, None)
        if forgotten:
            log.warning("jobs without an evaluation", extra={"count": len(forgotten)})

    async def retire(self, placement: Placement, grace_s: float) -> None:  # noqa: ARG002  # Nomad takes kill_timeout from the job
        # no purge: a purged job's process may be left running (GH-28242)
        await self._client.deregister(placement.ref)

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        if only is None or len(only) > _FEW or not self._listed:
            whole = await self._whole()
            if only is None:
                return whole
            asked = frozenset(only)
            part = {slug: found for slug, found in whole.placements.items() if slug in asked}
            return Snapshot(part, whole.index, asked)
        return await self._part(frozenset(only))

    async def still(self, snapshot: Snapshot) -> bool:
        """By the index of each table, which every write moves and an answer names, however short
        (https://developer.hashicorp.com/nomad/api-docs#blocking-queries)."""
        read = self._read
        if read is None or read[0] is not snapshot:
            return False
        one = {"per_page": "1"}
        asked = [
            ("/v1/jobs", "list-jobs"),
            ("/v1/allocations", "read-job"),
            ("/v1/evaluations", "read-job"),
        ]
        answers, changed = await asyncio.gather(
            asyncio.gather(*(self._client.get(*table, one) for table in asked)),
            self._nodes.changed(),
        )
        indexes = tuple(answer.index for answer in answers)
        return indexes == read[1] and all(read[1]) and not changed

    async def watch(self) -> AsyncIterator[Hint]:
        failures = 0
        while True:
            try:
                start = (await self._client.get("/v1/jobs", "list-jobs", {"per_page": "1"})).index
                # a look begun now shows what was before; what comes later is in the stream
                yield Hint(None, start)
                # Whatever is done to a job makes an evaluation: the topic Job would say it again, with
                # the whole job in it.
                topics = [("topic", "Allocation"), ("topic", "Evaluation")]
                if await self._nodes.visible():
                    topics.append(("topic", "Node"))
                first = True
                async with aclosing(
                    self._client.events([*topics, ("index", str(start))])  # type: ignore[type-var]
                ) as arrivals:
                    async for frames in arrivals:
                        failures = 0
                        index = 0
                        for frame in frames:
                            index = int(frame.get("Index") or index)
                            if first and index > start + 1:
                                yield Hint(None, index)  # the buffer may begin after our index
                            first = first and not index
                        if any(map(self._nodes.is_news, _events(frames))):
                            yield Hint(None, index)  # which agents it concerns, a full look shows
                        for slugs, calm in self._slugs_of(frames):
                            yield Hint(slugs, index, calm=calm)
            except (TransientError, TerminalError, UserError, ValueError) as error:
                log.warning("event stream lost", extra={"reason": str(error)})
            failures += 1
            ceiling = min(_RECONNECT_MAX_S, 0.5 * 2 ** min(failures, 10))
            await asyncio.sleep(random.uniform(0.05, ceiling))  # noqa: S311  # jitter

    async def capacity(self) -> Capacity:
        # not by `filter`, an expression that Nomad evaluates for each of all evaluations
        found = await self._client.pages("/v1/evaluations", "read-job", {"status": "blocked"})
        ours = {one["JobID"]: unplaced([one]) for one in found.body if self._is_ours(one["JobID"])}
        return Capacity.beside(ours.values(), self._blocked_limit)

    async def sweep(self, dead: Collection[Placement]) -> int:
        done = 0
        newest: dict[Slug, Epoch] = {}
        slugs = {one.slug for one in dead}
        now = await self.snapshot(only=slugs)
        for slug in slugs:
            newest[slug] = max(
                (one.epoch for one in now.placements.get(slug, ())), default=Epoch(0)
            )
        sure = {
            one.ref
            for found in now.placements.values()
            for one in found
            if one.state is PlacementState.DEAD
        }
        for one in dead:
            # the newest keeps its token burnt, so that a late dispatch cannot bring its epoch back
            if one.ref not in sure or one.epoch >= newest[one.slug]:
                continue
            await self._client.deregister(one.ref, purge=True)
            done += 1
        return done

    async def close(self) -> None:
        await self._client.close()

    def _parent(self, agent_class: str, shard: int) -> str:
        if known := self._names.get((agent_class, shard)):
            return known
        if not _NAME.fullmatch(agent_class) or re.fullmatch(r"(.*-)?s\d+", agent_class):
            raise UserError(
                f"agent class {agent_class!r}: allowed are a-z, 0-9 and -, not ending like a shard (s1)"
            )
        name = self._prefix if agent_class == "default" else f"{self._prefix}-{agent_class}"
        name = name if self._shards == 1 else f"{name}-s{shard}"
        self._names[agent_class, shard] = name
        return name

    async def _register_parent(
        self, job: Mapping[str, Any], job_id: str, living: Sequence[str]
    ) -> None:
        """Register a parent unless there is one that differs in nothing but the living replica that agents
        are fetched from: replicas would write each other's parents for ever."""
        found = await self._client.job(job_id)
        if found is not None and not found.get("Stop"):
            if found.get("ParameterizedJob") is None:
                raise TerminalError(f"nomad job {job_id!r} exists and is no parameterized job")
            said = found.get("Meta") or {}
            owner = said.get("installation", "")
            if owner != self._installation:
                raise TerminalError(
                    f"nomad job {job_id!r} belongs to installation {owner!r}: choose another prefix"
                )
            own, source = job["Meta"][SOURCE], said.get(SOURCE, "")
            fetched = source == own or bool(own and is_at(source, living))
            if said.get("parent_hash") == job["Meta"]["parent_hash"] and fetched:
                return
        await self._client.register({**job, "ID": job_id, "Name": job_id})
        log.info("parent job registered", extra={"job": job_id})

    async def _ensure_registered(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        parent = self._built.get((spec.agent_class, spec.spec_hash))
        if parent is None:
            parent = await _jobs.build(
                self._client, spec, self._parent(spec.agent_class, 0), self._installation
            )
            self._built[spec.agent_class, spec.spec_hash] = parent
        job_id = f"{self._prefix}-{record.slug}"
        told = _jobs.meta(record, epoch, spec, shard_of(record.slug, self._shards))
        data = _jobs.payload(record, epoch, spec)
        job = _jobs.service_job(parent, job_id, data, told)
        for _ in range(_TRIES):
            found = await self._client.job(job_id)
            if found is not None:
                who = identity(found, self._installation)
                if who is None:
                    raise TerminalError(f"nomad job {job_id!r} exists and is not ours")
                if who[2] > epoch:
                    raise ConflictError(f"{record.slug} is at epoch {who[2]} already, not {epoch}")
                if who[2] == epoch:
                    return int(found["JobModifyIndex"])
            try:
                return await self._client.register(
                    job, enforce=0 if found is None else int(found["JobModifyIndex"])
                )
            except ConflictError:
                continue
        raise TransientError(f"job {job_id} is changed by others all the time")

    async def _whole(self) -> Snapshot:
        before = self._index
        ask = {"prefix": self._prefix, "meta": "true"}
        jobs = await self._client.pages("/v1/jobs", "list-jobs", ask)
        # read after the jobs and from the leader too, so at least as new: the jobs' index is good
        mine = {"filter": f'JobID matches "^{self._prefix}"'}
        waiting = {"filter": 'Status == "blocked" or Status == "pending"'}
        allocs, evals, _ = await asyncio.gather(
            self._client.pages("/v1/allocations", "read-job", mine),
            self._client.pages("/v1/evaluations", "read-job", waiting),
            self._nodes.refresh(),
        )
        if jobs.index < before:
            self._index = 0
            raise StaleError(f"nomad's index went back from {before} to {jobs.index}")
        known = {job["ID"] for job in jobs.body}
        if hidden := unlisted(known, allocs.body, jobs.index):
            raise StaleError(f"nomad's list of jobs leaves out {len(hidden)} that have agents")
        await self._believe(known, None)
        self._index = max(self._index, jobs.index)
        self._parents |= {
            parent for job in jobs.body if (parent := job.get("ParentID")) and self._is_ours(parent)
        }
        self._listed = True
        settled_by = self._clock.monotonic() - SECOND_LOOK_S
        found, self.malformed = self._placements(jobs.body, allocs.body, evals.body)
        self._memory.take(found, None)
        self._first_dead = {k: v for k, v in self._first_dead.items() if k in known}
        self._unevaluated = {k: v for k, v in self._unevaluated.items() if k in known}
        read = Snapshot(found, jobs.index, closed_hosts=self._nodes.now.closed())
        settled = all(since <= settled_by for since in self._first_dead.values())
        self._read = (read, (jobs.index, allocs.index, evals.index)) if settled else None
        return read

    async def _part(self, asked: frozenset[Slug]) -> Snapshot:
        limit = asyncio.Semaphore(_AT_ONCE)

        async def rows(slug: Slug) -> tuple[list[Row], int]:
            prefixes = [f"{parent}/dispatch-{slug}-" for parent in sorted(self._parents)]
            jobs: list[Row] = []
            least = 0
            for prefix in [*prefixes, f"{self._prefix}-{slug}"]:
                async with limit:
                    ask = {"prefix": prefix, "meta": "true"}
                    answer = await self._client.pages("/v1/jobs", "list-jobs", ask)
                jobs.extend(answer.body)
                least = min(least, answer.index) if least else answer.index
            return jobs, least

        async def below(job: Row, what: str) -> list[Row]:
            async with limit:
                path = f"/v1/job/{quote(job['ID'], safe='')}/{what}"
                try:
                    return list((await self._client.get(path, "read-job")).body or [])
                except NotFoundError:
                    return []

        answers = await asyncio.gather(*(rows(slug) for slug in sorted(asked)))
        jobs = [job for found, _ in answers for job in found]
        await self._believe({job["ID"] for job in jobs}, asked)
        allocs = await asyncio.gather(*(below(job, "allocations") for job in jobs))
        evals = await asyncio.gather(*(below(job, "evaluations") for job in jobs))
        placed, _ = self._placements(jobs, _flat(allocs), _flat(evals))
        self._memory.take(placed, asked)
        index = min((least for _, least in answers), default=self._index)
        return Snapshot({k: v for k, v in placed.items() if k in asked}, index, asked)

    async def _believe(self, listed: set[str], only: frozenset[Slug] | None) -> None:
        """Raise StaleError when a list leaves out a job that Nomad has (S7)."""
        for job_id in self._memory.vanished(listed, only):
            if await self._client.job(job_id) is not None:
                raise StaleError(f"nomad's list of jobs leaves out {job_id}, which is there")

    def _placements(
        self, jobs: Iterable[Row], allocs: Iterable[Row], evals: Iterable[Row]
    ) -> tuple[dict[Slug, tuple[Placement, ...]], int]:
        allocs_of, evals_of = _by_job(allocs), _by_job(evals)
        found: dict[Slug, list[Placement]] = defaultdict(list)
        malformed = 0
        now = self._clock.monotonic()
        for job in jobs:
            try:
                who = identity(job, self._installation)
            except UserError as error:
                malformed += 1
                log.debug("job skipped", extra={"job": job["ID"], "reason": str(error)})
                continue
            if who is None:
                continue
            mine, waiting = allocs_of.get(job["ID"], []), evals_of.get(job["ID"], [])
            waiting = [one for one in waiting if one.get("Status") in {"pending", "blocked"}]
            if looks_dead(job, mine, waiting):
                settled = now - self._first_dead.setdefault(job["ID"], now) >= SECOND_LOOK_S
            else:
                settled = False
                self._first_dead.pop(job["ID"], None)
            if unevaluated(job, mine, waiting):
                self._unevaluated.setdefault(job["ID"], now)
            else:
                self._unevaluated.pop(job["ID"], None)
            one = placement(job, who, mine, waiting, settled=settled, nodes=self._nodes.now)
            found[who[0]].append(one)
        return {
            slug: tuple(sorted(some, key=lambda one: (one.epoch, one.created_at, one.ref)))
            for slug, some in found.items()
        }, malformed

    def _is_ours(self, job_id: str) -> bool:
        return job_id == self._prefix or job_id.startswith((f"{self._prefix}-", f"{self._prefix}/"))

    def _slugs_of(self, frames: Iterable[Mapping[str, Any]]) -> list[tuple[frozenset[Slug], bool]]:
        found: dict[bool, set[Slug]] = {True: set(), False: set()}
        for event in _events(frames):
            payload = event.get("Payload") or {}
            for key in ("Allocation", "Evaluation"):
                said = payload.get(key) or {}
                job_id = said.get("JobID", "")
                if self._is_ours(job_id) and (slug := self._slug_in(job_id)):
                    found[is_calm(key, said)].add(slug)
        return [(frozenset(slugs), calm) for calm, slugs in found.items() if slugs]

    def _slug_in(self, job_id: str) -> Slug | None:
        _, dispatched, rest = job_id.partition("/dispatch-")
        # <slug>-<unix seconds>-<8 hex>, or <prefix>-<slug>
        slug = rest.rsplit("-", 2)[0] if dispatched else job_id.removeprefix(f"{self._prefix}-")
        return Slug(slug) if len(slug) <= _SLUG_LENGTH and is_slug(slug) else None


def _events(frames: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (event for frame in frames for event in frame.get("Events") or ())


def _flat(lists: Iterable[list[Row]]) -> list[Row]:
    return [row for rows in lists for row in rows]


def _is_parent_missing(error: WatchdogError) -> bool:
    """Whether a dispatch failed because its parent job is stopped or gone (Nomad answers 500 with these
    texts, and 404 from 1.8 on), or is one that an older version has written."""
    said = str(error)
    causes = ("job not found", "is stopped", "unpermitted metadata")
    return isinstance(error, NotFoundError) or any(cause in said for cause in causes)


def _unstopped(jobs: Iterable[Row]) -> list[str]:
    return [job["ID"] for job in jobs if not job.get("Stop")]


def _by_job(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["JobID"]].append(row)
    return found
