"""Pools on Nomad: a service job each, whose group's count is the number of workers.

Nomad keeps the count, and refuses one outside of the job's `scaling` block, whoever asks. With
`scaler = "external"` that block holds the policy for Nomad Autoscaler, and nobody here touches the count.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote

from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.config.pools import MetricSettings, PoolSettings
from nomad_watchdog.errors import (
    ConflictError,
    NotFoundError,
    TerminalError,
    TransientError,
    UserError,
)
from nomad_watchdog.pools import Usage, View, average
from nomad_watchdog.schedulers import job_templates

TEMPLATE: Final = "pool-worker"
_MIB: Final = 1024 * 1024
_META: Final = ("installation", "pool", "worker_hash", "pool_hash")
_AT_ONCE: Final = 8
_TRIES: Final = 4
_APM: Final = {"cpu": "avg_cpu-allocated", "memory": "avg_memory-allocated"}
"""Queries of the Autoscaler's own source for Nomad: percent of what a worker was given."""


class NomadPools:
    """The driver for the backend `nomad`."""

    def __init__(self, client: NomadClient, *, installation: str, prefix: str) -> None:
        self._client = client
        self._installation = installation
        # no agent class can have a name with a dot in it, so no parent job is ever called so
        self._prefix = f"{prefix}.pool."
        self._built: dict[str, tuple[str, dict[str, Any]]] = {}

    async def close(self) -> None:
        await self._client.close()

    async def run(self, ours: Callable[[], bool]) -> None:  # noqa: ARG002  # as the protocol has it
        """Nomad minds the workers by itself."""
        await asyncio.Event().wait()

    async def look(self) -> Mapping[str, View]:
        params = {"prefix": self._prefix, "meta": "true"}
        listed = await self._client.pages("/v1/jobs", "list-jobs", params)
        ours = [
            job["ID"]
            for job in listed.body
            if not job.get("Stop") and (job.get("Meta") or {}).get("pool") and self._is_ours(job)
        ]
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(job_id: str) -> tuple[str, View | None]:
            name = job_id.removeprefix(self._prefix)
            async with limit:
                return name, await self.view(name)

        found = await asyncio.gather(*map(one, ours))
        return {name: view for name, view in found if view is not None}

    async def view(self, name: str) -> View | None:
        found = await self._client.job(self._id(name))
        if found is None or found.get("Stop") or not self._is_ours(found):
            return None
        try:
            return await self._view(found)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TransientError(f"nomad tells of a pool what makes no sense: {error!r}") from error

    async def ensure(self, name: str, pool: PoolSettings) -> None:
        wanted = await self._job(name, pool)
        for _ in range(_TRIES):
            found = await self._client.job(self._id(name))
            if found is not None and not self._is_ours(found):
                raise TerminalError(f"nomad job {self._id(name)!r} is not of this installation")
            stands = found is not None and not found.get("Stop")
            same = stands and found["Meta"].get("pool_hash") == wanted["Meta"]["pool_hash"]  # type: ignore[index]
            if same:
                return
            count = found["TaskGroups"][0]["Count"] if found is not None and stands else pool.min
            job = wanted | {"TaskGroups": [dict(wanted["TaskGroups"][0])]}
            job["TaskGroups"][0]["Count"] = max(pool.min, min(pool.max, count))
            index = found["JobModifyIndex"] if found is not None else 0
            try:
                await self._client.register(job, enforce=index)
            except ConflictError:
                continue  # scaled meanwhile, and that count must not be lost
            return
        raise ConflictError(f"nomad job {self._id(name)!r} is changed by somebody all the time")

    async def scale(self, name: str, count: int, reason: str) -> None:
        found = await self._client.job(self._id(name))
        if found is None or found.get("Stop") or not self._is_ours(found):
            raise NotFoundError(f"no pool {name!r}")
        group = found["TaskGroups"][0]["Name"]
        await self._client.scale(self._id(name), group, count, reason)

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
                    answer = await self._client.get(path, "read-job")
                except NotFoundError:
                    return None
            return used(answer.body, pool)

        shares = [found for found in await asyncio.gather(*map(one, running)) if found is not None]
        return average(shares, len(running))

    def _id(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _is_ours(self, job: Mapping[str, Any]) -> bool:
        return bool((job.get("Meta") or {}).get("installation", "") == self._installation)

    async def _view(self, found: Mapping[str, Any]) -> View:
        job_id = found["ID"]
        status = await self._client.get(f"/v1/job/{quote(job_id, safe='')}/scale", "read-job")
        (group,) = found["TaskGroups"][:1]
        told = (status.body.get("TaskGroups") or {}).get(group["Name"]) or {}
        running = await self._running(job_id)
        trouble = "" if len(running) >= group["Count"] else await self._trouble(job_id)
        return View(
            count=int(told.get("Desired", group["Count"])),
            running=len(running),
            worker_hash=found["Meta"].get("worker_hash", ""),
            workers=tuple(running),
            trouble=trouble,
        )

    async def _running(self, job_id: str) -> list[str]:
        path = f"/v1/job/{quote(job_id, safe='')}/allocations"
        rows = (await self._client.get(path, "read-job")).body or []
        return sorted(
            row["ID"]
            for row in rows
            if row["ClientStatus"] == "running" and row["DesiredStatus"] == "run"
        )

    async def _trouble(self, job_id: str) -> str:
        path = f"/v1/job/{quote(job_id, safe='')}/evaluations"
        rows = (await self._client.get(path, "read-job")).body or []
        failed = [row for row in rows if row.get("Status") == "blocked"]
        return f"{len(failed)} evaluations blocked: no node has room" if failed else ""

    async def _job(self, name: str, pool: PoolSettings) -> dict[str, Any]:
        """The job as it should be; parsed and validated by Nomad once a change. Raises UserError."""
        template = await asyncio.to_thread(job_templates.load, pool.template or TEMPLATE)
        key = hashlib.sha256(f"{template.text}\0{pool.model_dump_json()}".encode()).hexdigest()
        before = self._built.get(name)
        if before is not None and before[0] == key:
            return before[1]
        job = await self._client.parse(
            template.text, job_templates.variables_text(variables(name, pool))
        )
        job = finished(
            job, name, pool, job_id=self._id(name), installation=self._installation, key=key
        )
        job["Meta"]["worker_hash"] = pool.worker_hash(template.text)
        await self._client.validate(job)
        self._built[name] = (key, job)
        return job


def variables(name: str, pool: PoolSettings) -> dict[str, str]:
    """What the template is filled with. Without a template the built-in one, which knows all of them;
    one's own gets what is set, and need not declare the rest."""
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


def finished(
    job: dict[str, Any], name: str, pool: PoolSettings, *, job_id: str, installation: str, key: str
) -> dict[str, Any]:
    """A parsed template as the pool's job. Raises UserError for one that can't be a pool."""
    groups = job.get("TaskGroups") or []
    if len(groups) != 1:
        raise UserError(f"pool {name}: the template has {len(groups)} groups; exactly 1 is allowed")
    if job.get("Type") not in (None, "service") or job.get("ParameterizedJob"):
        raise UserError(f'pool {name}: the template must be of type "service", without parameters')
    if job.get("Periodic"):
        raise UserError(f"pool {name}: the template must not be periodic")
    meta = dict(job.get("Meta") or {})
    if taken := sorted(set(meta) & set(_META)):
        raise UserError(
            f"pool {name}: the template's meta names {', '.join(taken)}; these are ours"
        )
    group = {**groups[0], "Count": pool.min, "Scaling": scaling_block(pool)}
    return job | {
        "ID": job_id,
        "Name": job_id,
        "Type": "service",
        "TaskGroups": [group],
        "Meta": meta | {"installation": installation, "pool": name, "pool_hash": key[:16]},
    }


def scaling_block(pool: PoolSettings) -> dict[str, Any]:
    """The group's `scaling`, as Nomad's parser makes it from HCL. Bounds always; a policy only for
    Nomad Autoscaler, which leaves alone what is not enabled."""
    external = pool.scaler == "external"
    return {
        "Min": pool.min,
        "Max": pool.max,
        "Enabled": external,
        "Type": "horizontal",
        "Policy": _policy(pool, pool.metric[0]) if external else None,
    }


def _policy(pool: PoolSettings, metric: MetricSettings) -> dict[str, Any]:
    """`policy` for Nomad Autoscaler (its docs, "Scaling policies" and "Strategies")."""
    if metric.kind in _APM:
        source, query = "nomad-apm", _APM[metric.kind]
    else:
        source, query = "prometheus", metric.query or ""
    if metric.measure == "all":
        # target-value takes the metric for an average of the workers, so the sum is divided here
        query = f"ceil(({query}) / {_number(metric.target)})"
        strategy: dict[str, Any] = {"pass-through": [{}]}
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


def used(stats: Any, pool: PoolSettings) -> tuple[float, float] | None:
    """(CPU, memory) of one allocation in percent of its share; None before the first measurement.

    Also None where Nomad measures nothing: with control groups v1, or none, it answers 0 for everything
    (1.11.3), and that is no idle worker. No process that lives has no memory."""
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
