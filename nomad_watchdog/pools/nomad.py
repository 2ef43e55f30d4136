"""Pools on Nomad: one service job per pool; the count of its group is the number of workers.

Nomad stores the count, and rejects one outside of the job's `scaling` block. With `scaler = "external"` that
block contains the policy for Nomad Autoscaler, and the control plane does not change the count.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import quote

from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.clients.nomad_rows import (
    Allocation,
    AllocationStats,
    Evaluation,
    Job,
    JobScale,
    TaskGroup,
)
from nomad_watchdog.config.pools import MetricSettings, PoolSettings
from nomad_watchdog.errors import (
    ConflictError,
    NotFoundError,
    TerminalError,
    TransientError,
    UserError,
)
from nomad_watchdog.pools import PoolStatus, Usage, average
from nomad_watchdog.schedulers import job_templates

TEMPLATE: Final = "pool-worker"
_MIB: Final = 1024 * 1024
_AT_ONCE: Final = 8
_TRIES: Final = 4
_APM: Final = {"cpu": "avg_cpu-allocated", "memory": "avg_memory-allocated"}
"""Queries of the Autoscaler's own source for Nomad, in percent of a worker's share."""


class NomadPools:
    """The driver for the backend `nomad`."""

    def __init__(self, client: NomadClient, *, installation: str, prefix: str) -> None:
        self._client = client
        self._installation = installation
        # the name of an agent class has no dot, so no parent job has this prefix
        self._prefix = f"{prefix}.pool."
        self._built: dict[str, tuple[str, Job]] = {}

    async def close(self) -> None:
        await self._client.close()

    async def run(self, is_leader: Callable[[], bool]) -> None:  # noqa: ARG002  # the protocol's signature
        """Nomad starts and restarts the workers by itself."""
        await asyncio.Event().wait()

    async def list_pools(self) -> Mapping[str, PoolStatus]:
        params = {"prefix": self._prefix, "meta": "true"}
        listed = await self._client.pages("/v1/jobs", "list-jobs", params)
        ours = [
            job["ID"]
            for job in listed.body
            if not job.get("Stop") and (job.get("Meta") or {}).get("pool") and self._is_ours(job)
        ]
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(job_id: str) -> tuple[str, PoolStatus | None]:
            name = job_id.removeprefix(self._prefix)
            async with limit:
                return name, await self.status(name)

        found = await asyncio.gather(*map(one, ours))
        return {name: status for name, status in found if status is not None}

    async def status(self, name: str) -> PoolStatus | None:
        found = await self._client.job(self._id(name))
        if found is None or found.get("Stop") or not self._is_ours(found):
            return None
        try:
            return await self._status(found)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TransientError(
                f"nomad's answer about pool {name} has an unexpected form: {error!r}"
            ) from error

    async def ensure(self, name: str, pool: PoolSettings) -> None:
        wanted = await self._job(name, pool)
        for _ in range(_TRIES):
            found = await self._client.job(self._id(name))
            if found is not None and not self._is_ours(found):
                raise TerminalError(
                    f"nomad job {self._id(name)!r} exists and does not belong to this installation"
                )
            count = pool.min
            if found is not None and not found.get("Stop"):
                if _meta(found).get("pool_hash") == _meta(wanted)["pool_hash"]:
                    return
                count = _group(found).get("Count") or 0
            group: TaskGroup = {**_group(wanted), "Count": max(pool.min, min(pool.max, count))}
            index = found["JobModifyIndex"] if found is not None else 0
            try:
                await self._client.register({**wanted, "TaskGroups": [group]}, enforce=index)
            except ConflictError:
                continue  # it was scaled at the same time, and the new count must not be lost
            return
        raise ConflictError(
            f"nomad job {self._id(name)!r} was changed by another writer in each of {_TRIES} attempts"
        )

    async def scale(self, name: str, count: int, reason: str) -> None:
        found = await self._client.job(self._id(name))
        if found is None or found.get("Stop") or not self._is_ours(found):
            raise NotFoundError(f"no pool {name!r}")
        await self._client.scale(self._id(name), _group(found)["Name"], count, reason)

    async def remove(self, name: str) -> None:
        found = await self._client.job(self._id(name))
        if found is not None and not found.get("Stop") and self._is_ours(found):
            await self._client.deregister(self._id(name))

    async def usage(self, name: str, pool: PoolSettings) -> Usage | None:
        running = await self._running(self._id(name))
        if not running:
            return None
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(alloc: str) -> tuple[float, float] | None:
            async with limit:
                path = f"/v1/client/allocation/{quote(alloc, safe='')}/stats"
                try:
                    stats: AllocationStats = (await self._client.get(path, "read-job")).body
                except NotFoundError:
                    return None
            return used(stats, pool)

        shares = [found for found in await asyncio.gather(*map(one, running)) if found is not None]
        return average(shares, len(running))

    def _id(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _is_ours(self, job: Job) -> bool:
        return _meta(job).get("installation", "") == self._installation

    async def _status(self, job: Job) -> PoolStatus:
        job_id, group = job["ID"], _group(job)
        path = f"/v1/job/{quote(job_id, safe='')}/scale"
        scale: JobScale = (await self._client.get(path, "read-job")).body
        count = group["Count"] or 0
        desired = (scale.get("TaskGroups") or {}).get(group["Name"]) or {}
        running = await self._running(job_id)
        return PoolStatus(
            count=int(desired.get("Desired", count)),
            running=len(running),
            worker_hash=_meta(job).get("worker_hash", ""),
            workers=tuple(running),
            problem="" if len(running) >= count else await self._problem(job_id),
        )

    async def _running(self, job_id: str) -> list[str]:
        path = f"/v1/job/{quote(job_id, safe='')}/allocations"
        rows: list[Allocation] = (await self._client.get(path, "read-job")).body or []
        return sorted(
            row["ID"]
            for row in rows
            if row["ClientStatus"] == "running" and row["DesiredStatus"] == "run"
        )

    async def _problem(self, job_id: str) -> str:
        path = f"/v1/job/{quote(job_id, safe='')}/evaluations"
        rows: list[Evaluation] = (await self._client.get(path, "read-job")).body or []
        failed = [row for row in rows if row.get("Status") == "blocked"]
        return f"{len(failed)} evaluations blocked: no node has room" if failed else ""

    async def _job(self, name: str, pool: PoolSettings) -> Job:
        """The job as it should be, parsed and validated by Nomad once per change. Raises UserError."""
        template = await asyncio.to_thread(job_templates.load, pool.template or TEMPLATE)
        key = hashlib.sha256(f"{template.text}\0{pool.model_dump_json()}".encode()).hexdigest()
        before = self._built.get(name)
        if before is not None and before[0] == key:
            return before[1]
        parsed = await self._client.parse(
            template.text, job_templates.variables_text(variables(name, pool))
        )
        meta = {
            "installation": self._installation,
            "pool": name,
            "pool_hash": key[:16],
            "worker_hash": pool.worker_hash(template.text),
        }
        job = pool_job(parsed, name, pool, job_id=self._id(name), meta=meta)
        await self._client.validate(job)
        self._built[name] = (key, job)
        return job


def _meta(job: Job) -> Mapping[str, str]:
    return job.get("Meta") or {}


def _group(job: Job) -> TaskGroup:
    """The one group of a pool's job. Raises IndexError when it has none."""
    return (job.get("TaskGroups") or [])[0]


def variables(name: str, pool: PoolSettings) -> dict[str, str]:
    """The variables of the template. The built-in one declares all of them; an operator's template gets those
    that are set, and need not declare the rest."""
    own = {
        "pool": name,
        "cpu": str(pool.cpu),
        "memory": str(max(10, pool.memory // _MIB)),
        "kill_timeout": f"{max(1, round(pool.kill_timeout * 1000))}ms",
    }
    if not pool.template:
        own["command"] = json.dumps(pool.command)
        own["env"] = json.dumps(pool.env)
        own["image"] = pool.image or ""
    return own | pool.variables


def pool_job(
    job: Job, name: str, pool: PoolSettings, *, job_id: str, meta: Mapping[str, str]
) -> Job:
    """A parsed template as the pool's job. `meta`: added to the template's. Raises UserError for a template that
    is not suitable for a pool."""
    groups = job.get("TaskGroups") or []
    if len(groups) != 1:
        raise UserError(f"pool {name}: the template has {len(groups)} groups; exactly 1 is allowed")
    if job.get("Type") not in (None, "service") or job.get("ParameterizedJob"):
        raise UserError(
            f'pool {name}: the template must be of type "service" and not parameterized'
        )
    if job.get("Periodic"):
        raise UserError(f"pool {name}: the template must not be periodic")
    own = _meta(job)
    if taken := sorted(own.keys() & meta.keys()):
        raise UserError(
            f"pool {name}: remove {', '.join(taken)} from the template's meta: the control plane sets it"
        )
    group: TaskGroup = {**groups[0], "Count": pool.min, "Scaling": scaling_block(pool)}
    return {
        **job,
        "ID": job_id,
        "Name": job_id,
        "Type": "service",
        "TaskGroups": [group],
        "Meta": {**own, **meta},
    }


def scaling_block(pool: PoolSettings) -> dict[str, object]:
    """The group's `scaling` block, as Nomad's parser returns it for HCL. It always has bounds, and a policy only
    for Nomad Autoscaler, which ignores a block that is not enabled."""
    external = pool.scaler == "external"
    return {
        "Min": pool.min,
        "Max": pool.max,
        "Enabled": external,
        "Type": "horizontal",
        "Policy": _policy(pool, pool.metric[0]) if external else None,
    }


def _policy(pool: PoolSettings, metric: MetricSettings) -> dict[str, object]:
    """Block `policy` for Nomad Autoscaler (its documentation, "Scaling policies" and "Strategies")."""
    if metric.kind in _APM:
        source, query = "nomad-apm", _APM[metric.kind]
    else:
        source, query = "prometheus", metric.query or ""
    if metric.measure == "all":
        # the strategy target-value expects an average over the workers; a sum is divided by the target here
        query = f"ceil(({query}) / {_number(metric.target)})"
        strategy: dict[str, object] = {"pass-through": [{}]}
    else:
        strategy = {"target-value": [{"target": metric.target, "threshold": pool.tolerance}]}
    check = {"source": source, "query": query, "strategy": [strategy]}
    return {
        "cooldown": f"{math.ceil(pool.cooldown_down)}s",
        "cooldown_on_scale_up": f"{math.ceil(pool.cooldown_up)}s",
        "evaluation_interval": f"{math.ceil(pool.interval)}s",
        "check": [{metric.kind: [check]}],
    }


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def used(stats: AllocationStats, pool: PoolSettings) -> tuple[float, float] | None:
    """CPU and memory of one allocation in percent of its share; None before the first measurement.

    Also None where Nomad measures nothing: with control groups v1, or without them, it returns 0 for everything
    (1.11.3), which must not count as an idle worker. A running process always uses memory."""
    try:
        found = stats["ResourceUsage"]
        cpu, memory = found["CpuStats"], found["MemoryStats"]
        ticks, amount = cpu["TotalTicks"], memory.get("Usage") or memory.get("RSS") or 0
        measured = cpu.get("Measured")
    except (KeyError, TypeError, AttributeError):
        return None
    if not measured or amount <= 0:
        return None
    return 100.0 * ticks / pool.cpu, 100.0 * amount / pool.memory
