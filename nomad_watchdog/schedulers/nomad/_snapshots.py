"""Snapshots of the placements on Nomad, read from its lists of jobs, allocations and evaluations."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final, TypeVar
from urllib.parse import quote

from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.clients.nomad_rows import Allocation, Evaluation, Job
from nomad_watchdog.clock import Clock
from nomad_watchdog.errors import NotFoundError, StaleError, UserError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Placement
from nomad_watchdog.schedulers import Snapshot, by_device
from nomad_watchdog.schedulers.nomad._list_check import unlisted
from nomad_watchdog.schedulers.nomad._names import JobNames
from nomad_watchdog.schedulers.nomad._view import (
    SECOND_LOOK_S,
    JobIdentity,
    identity,
    looks_dead,
    placement,
    unevaluated,
    wait_forgotten,
)
from nomad_watchdog.schedulers.nomad.nodes import NodeList
from nomad_watchdog.schedulers.vanished import Vanished

log = logging.getLogger(__name__)

_FEW: Final = 24
"""Maximum number of devices that are read one by one; for more the full list is cheaper."""
_AT_ONCE: Final = 8
AGAIN_S: Final = 10.0
"""Minimum time between two evaluations of a job that we request, in seconds."""
_Row = TypeVar("_Row", Allocation, Evaluation)


class SnapshotReader:
    """Reads snapshots, and compares each with the ones before it."""

    def __init__(
        self,
        client: NomadClient,
        names: JobNames,
        nodes: NodeList,
        clock: Clock,
        installation: str,
    ) -> None:
        self._client = client
        self._names = names
        self._nodes = nodes
        self._clock = clock
        self._installation = installation
        self._listed = False
        self._index = 0
        self._first_dead: dict[str, float] = {}
        self._forgotten: dict[str, float] = {}
        """Jobs that Nomad has forgotten to evaluate, and when we request an evaluation."""
        self._read: tuple[Snapshot, tuple[int, ...]] | None = None
        """The last full snapshot, and the indexes of the tables that it was read from. None while a second
        read may show something else although Nomad's tables did not change."""
        self._memory = Vanished()

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        """As `Scheduler.snapshot`."""
        if only is not None and len(only) <= _FEW and self._listed:
            return await self._part(frozenset(only))
        whole = await self._whole()
        return whole if only is None else whole.part(only)

    async def unchanged_since(self, snapshot: Snapshot) -> bool:
        """As `schedulers.unchanged_since`. Every write changes the index of its table, and even the shortest
        answer contains that index (https://developer.hashicorp.com/nomad/api-docs#blocking-queries)."""
        read = self._read
        if read is None or read[0] is not snapshot:
            return False
        one = {"per_page": "1"}
        tables = [
            ("/v1/jobs", "list-jobs"),
            ("/v1/allocations", "read-job"),
            ("/v1/evaluations", "read-job"),
        ]
        answers, changed = await asyncio.gather(
            asyncio.gather(*(self._client.get(*table, one) for table in tables)),
            self._nodes.changed(),
        )
        indexes = tuple(answer.index for answer in answers)
        return indexes == read[1] and all(read[1]) and not changed

    async def evaluate_forgotten(self) -> None:
        """Have Nomad evaluate the jobs that a crashed server left without an evaluation (L2), and those whose wait
        for a lost node it does not end (L1)."""
        now = self._clock.monotonic()
        forgotten = [ref for ref, due_at in self._forgotten.items() if due_at <= now]
        for ref in forgotten:
            self._forgotten[ref] = now + AGAIN_S
            with suppress(NotFoundError):
                await self._client.evaluate(ref)
        if forgotten:
            log.warning("jobs without an evaluation", extra={"count": len(forgotten)})

    async def _whole(self) -> Snapshot:
        before = self._index
        jobs = await self._client.pages(
            "/v1/jobs", "list-jobs", {"prefix": self._names.prefix, "meta": "true"}
        )
        # Read after the jobs and from the leader as well, so these are at least as new: the jobs' index is valid.
        mine = {"filter": f'JobID matches "^{self._names.prefix}"'}
        waiting = {"filter": 'Status == "blocked" or Status == "pending"'}
        allocs, evals, _ = await asyncio.gather(
            self._client.pages("/v1/allocations", "read-job", mine),
            self._client.pages("/v1/evaluations", "read-job", waiting),
            self._nodes.refresh(),
        )
        if jobs.index < before:
            self._index = 0
            raise StaleError(f"nomad's index went back from {before} to {jobs.index}")
        listed = {job["ID"] for job in jobs.body}
        if hidden := unlisted(listed, allocs.body, jobs.index):
            raise StaleError(f"nomad's list of jobs leaves out {len(hidden)} that have agents")
        await self._check_vanished(listed, None)
        self._index = max(self._index, jobs.index)
        self._names.parents |= {
            parent
            for job in jobs.body
            if (parent := job.get("ParentID")) and self._names.is_ours(parent)
        }
        self._listed = True
        settled_by = self._clock.monotonic() - SECOND_LOOK_S
        found = self._placements(jobs.body, allocs.body, evals.body)
        self._memory.remember(found, None)
        self._first_dead = {k: v for k, v in self._first_dead.items() if k in listed}
        self._forgotten = {k: v for k, v in self._forgotten.items() if k in listed}
        read = Snapshot(found, jobs.index, closed_hosts=self._nodes.now.closed())
        settled = all(since <= settled_by for since in self._first_dead.values())
        self._read = (read, (jobs.index, allocs.index, evals.index)) if settled else None
        return read

    async def _part(self, only: frozenset[Slug]) -> Snapshot:
        limit = asyncio.Semaphore(_AT_ONCE)

        async def jobs_of(slug: Slug) -> tuple[list[Job], int]:
            jobs: list[Job] = []
            least = 0
            for prefix in self._names.prefixes_of(slug):
                async with limit:
                    params = {"prefix": prefix, "meta": "true"}
                    answer = await self._client.pages("/v1/jobs", "list-jobs", params)
                jobs.extend(answer.body)
                least = min(least, answer.index) if least else answer.index
            return jobs, least

        answers = await asyncio.gather(*(jobs_of(slug) for slug in sorted(only)))
        jobs = [job for found, _ in answers for job in found]
        await self._check_vanished({job["ID"] for job in jobs}, only)
        allocs: list[Allocation] = await self._below(jobs, "allocations", limit)
        evals: list[Evaluation] = await self._below(jobs, "evaluations", limit)
        placed = self._placements(jobs, allocs, evals)
        self._memory.remember(placed, only)
        index = min((least for _, least in answers), default=self._index)
        return Snapshot(placed, index).part(only)

    async def _below(self, jobs: Iterable[Job], table: str, limit: asyncio.Semaphore) -> list[_Row]:
        """The allocations or evaluations of these jobs; a job that is gone has none."""

        async def of(job: Job) -> list[_Row]:
            async with limit:
                path = f"/v1/job/{quote(job['ID'], safe='')}/{table}"
                try:
                    return (await self._client.get(path, "read-job")).body or []
                except NotFoundError:
                    return []

        return [row for rows in await asyncio.gather(*map(of, jobs)) for row in rows]

    async def _check_vanished(self, listed: set[str], only: frozenset[Slug] | None) -> None:
        """Raise StaleError when a list leaves out a job that Nomad has (S7)."""
        for job_id in self._memory.vanished(listed, only):
            if await self._client.job(job_id) is not None:
                raise StaleError(f"nomad's list of jobs leaves out {job_id}, which exists")

    def _placements(
        self, jobs: Iterable[Job], allocs: Iterable[Allocation], evals: Iterable[Evaluation]
    ) -> dict[Slug, tuple[Placement, ...]]:
        allocs_of, evals_of = _by_job(allocs), _by_job(evals)
        found: list[Placement] = []
        for job in jobs:
            who = self._identity(job)
            if who is None:
                continue
            mine = allocs_of.get(job["ID"], [])
            waiting = [
                one
                for one in evals_of.get(job["ID"], [])
                if one.get("Status") in {"pending", "blocked"}
            ]
            settled = self._note_first_seen(job, mine, waiting)
            found.append(placement(job, who, mine, waiting, settled=settled, nodes=self._nodes.now))
        return by_device(found)

    def _identity(self, job: Job) -> JobIdentity | None:
        try:
            return identity(job, self._installation)
        except UserError as error:
            log.debug("job skipped", extra={"job": job["ID"], "reason": str(error)})
            return None

    def _note_first_seen(self, job: Job, allocs: list[Allocation], evals: list[Evaluation]) -> bool:
        """Remember since when a job looks dead, and when it must be evaluated. Returns whether it has looked dead for
        at least SECOND_LOOK_S."""
        now = self._clock.monotonic()
        settled = False
        if looks_dead(job, allocs, evals):
            settled = now - self._first_dead.setdefault(job["ID"], now) >= SECOND_LOOK_S
        else:
            self._first_dead.pop(job["ID"], None)
        if unevaluated(job, allocs, evals) or wait_forgotten(job, allocs, evals):
            self._forgotten.setdefault(job["ID"], now + SECOND_LOOK_S)
        else:
            self._forgotten.pop(job["ID"], None)
        return settled


def _by_job(rows: Iterable[_Row]) -> dict[str, list[_Row]]:
    found: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        found[row["JobID"]].append(row)
    return found
