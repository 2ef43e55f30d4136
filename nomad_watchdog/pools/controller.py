"""Keeps the pools of one installation: looks, asks the decider, and does what it says.

Only the leader acts, so that two never pull at one pool; where the lease is in
doubt nobody does. A new holder knows no history, and with none a pool grows but does not shrink
(`core.pool_scaling`). Each pool has a task of its own: one whose metric hangs delays no other (S9).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.core import pool_scaling
from nomad_watchdog.core.pool_scaling import ScalingDecision, ScalingReason, ScalingState
from nomad_watchdog.errors import (
    ConflictError,
    NotFoundError,
    PreconditionError,
    UserError,
    WatchdogError,
)
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.pools import Driver, View
from nomad_watchdog.pools.metric_reader import MetricReader, Reading
from nomad_watchdog.replicas.leases import Leases
from nomad_watchdog.replicas.ownership import is_leader

log = logging.getLogger(__name__)

MIN_WAIT_S: Final = 0.1


@dataclass(slots=True)
class _Kept:
    """What is known of one pool."""

    memory: ScalingState = field(default_factory=ScalingState)
    view: View | None = None
    reading: Reading = field(default_factory=lambda: Reading(None, "not read yet"))
    decision: ScalingDecision | None = None
    problem: str = ""
    said: str = ""
    """The problem that was last told as an event."""
    would: int | None = None
    """What a dry run said last."""


class PoolController:
    """See the module. `pools`: as configured; what else the driver lists is shown and left alone."""

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        leases: Leases,
        driver: Driver,
        pools: Mapping[str, PoolSettings],
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._leases = leases
        self._driver = driver
        self.pools = pools
        self._gauge = MetricReader(
            driver, lambda: {s.value: n for s, n in fleet.verdicts.counts().items()}
        )
        self._kept = {name: _Kept() for name in pools}
        metrics.pools(pools)

    def ours(self) -> bool:
        """Whether this replica is the one that keeps the pools."""
        return is_leader(self._leases)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._driver.run(self.ours))
                for name in self.pools:
                    group.create_task(self._keep(name))
        finally:
            await self._gauge.close()

    async def _keep(self, name: str) -> None:
        kept = self._kept[name]
        while True:
            if self.ours():
                await self.look_once(name)
            else:
                kept.memory, kept.decision, kept.problem = ScalingState(), None, ""
            self._tell_metrics(name)
            await asyncio.sleep(max(MIN_WAIT_S, self.pools[name].interval))

    async def look_once(self, name: str) -> None:
        """One look at one pool, and what follows from it."""
        pool, kept = self.pools[name], self._kept[name]
        try:
            await self._driver.ensure(name, pool)
            kept.view = view = await self._driver.view(name)
            problem = view.trouble if view is not None else "the scheduler does not list it yet"
            if view is not None and pool.metric:
                kept.reading = await self._gauge.read(name, pool)
                problem = problem or kept.reading.reason
            if view is not None and pool.scaler == "builtin":
                await self._scale_by_metric(name, view)
        except ConflictError as error:
            # The workers are being replaced: no trouble, and over by one of the next looks.
            log.info("pool not scaled yet", extra={"pool": name, "reason": str(error)})
            problem = kept.problem
        except WatchdogError as error:
            problem = str(error)
        except (
            Exception
        ) as error:  # the pool's boundary: a bug costs one pool, not the control plane (S9)
            log.exception("pool's look crashed", extra={"pool": name})
            problem = f"internal error: {type(error).__name__}"
        self._note_problem(name, problem)

    async def _scale_by_metric(self, name: str, view: View) -> None:
        kept, clock = self._kept[name], self._fleet.clock
        rules = self.pools[name].rules()
        found = pool_scaling.decide(
            rules, view.count, kept.reading.value, kept.memory, clock.monotonic()
        )
        kept.decision, kept.memory = found, found.memory
        if found.dry_run:
            self._note_dry_run(name, view.count, found)
        if not found.acts or not self.ours():
            return
        await self._driver.scale(name, found.count, found.reason)
        kept.memory = pool_scaling.changed(found.memory, found.count, clock.monotonic())
        self._metrics.pool_scaled(name, str(found.verb))
        self._note_scaled(name, view.count, found.count, found.reason)

    # an operator's word

    async def scale(self, name: str, count: int, by: str) -> None:
        """Have so many workers. Raises NotFoundError, UserError for a number outside the bounds, and
        PreconditionError for a pool that another scaler has."""
        pool = self.pools.get(name)
        if pool is None:
            raise NotFoundError(f"no pool {name!r} in the configuration")
        if pool.scaler == "external":
            raise PreconditionError(f'pool {name!r} has scaler = "external"; scale it there')
        if not pool.min <= count <= pool.max:
            raise UserError(f"{count} workers: pool {name!r} may have {pool.min} to {pool.max}")
        view = await self._driver.view(name)
        await self._driver.scale(name, count, by)
        self._note_scaled(name, view.count if view else 0, count, by)

    async def remove(self, name: str) -> None:
        """Stop a pool that is no longer configured. Raises PreconditionError for one that is: it would be
        made again. NotFoundError when there is none."""
        if name in self.pools:
            raise PreconditionError(f"pool {name!r} is configured; take its block out first")
        if await self._driver.view(name) is None:
            raise NotFoundError(f"no pool {name!r}")
        await self._driver.remove(name)
        self._note(name, "pool.removed", f"pool {name} was removed", {})

    # what is shown

    async def shown(self) -> list[dict[str, Any]]:
        """All pools, those that are left over from an older configuration too, in the order of their
        names."""
        views = await self._driver.look()
        return [self._row(name, views.get(name)) for name in sorted({*self.pools, *views})]

    def _row(self, name: str, view: View | None) -> dict[str, Any]:
        pool, kept = self.pools.get(name), self._kept.get(name)
        row: dict[str, Any] = {
            "name": name,
            "configured": pool is not None,
            "count": view.count if view else 0,
            "running": view.running if view else 0,
            "workers": list(view.workers) if view else [],
        }
        if pool is None or kept is None:
            return row | {"problem": "not configured; `pools rm` stops it"}
        decision = kept.decision
        return row | {
            "min": pool.min,
            "max": pool.max,
            "scaler": pool.scaler,
            "dry_run": pool.dry_run,
            "metric": pool.metric[0].kind if pool.metric else "",
            "target": pool.metric[0].target if pool.metric else None,
            "value": kept.reading.value,
            "advised": decision.advised if decision else None,
            "reason": decision.reason if decision else "",
            "problem": kept.problem,
        }

    def _tell_metrics(self, name: str) -> None:
        kept, ours = self._kept[name], self.ours()
        decision, view = kept.decision, kept.view
        self._metrics.pool(
            name,
            wanted=view.count if view and ours else 0,
            running=view.running if view and ours else 0,
            advised=decision.advised if decision and ours else 0,
            problem=bool(kept.problem) and ours,
        )
        if (
            decision is not None
            and decision.why is not ScalingReason.NO_METRIC
            and kept.reading.value is not None
        ):
            self._metrics.pool_value(name, kept.reading.value)

    # what is told

    def _note_scaled(self, name: str, before: int, count: int, reason: str) -> None:
        log.info("pool scaled", extra={"pool": name, "before": before, "count": count})
        text = f"pool {name}: {before} workers became {count}: {reason}"
        self._note(name, "pool.scaled", text, {"before": before, "count": count})

    def _note_dry_run(self, name: str, count: int, found: ScalingDecision) -> None:
        kept = self._kept[name]
        would = found.count if found.count != count else None
        if would is not None and would != kept.would:
            text = f"pool {name}: {count} workers would become {would}: {found.reason}"
            self._note(name, "pool.would_scale", text, {"before": count, "count": would})
        kept.would = would

    def _note_problem(self, name: str, problem: str) -> None:
        """An event when a trouble begins, and when it is over; not one each look."""
        kept = self._kept[name]
        kept.problem = problem
        if problem and not kept.said:
            log.warning("pool in trouble", extra={"pool": name, "reason": problem})
            self._note(name, "pool.problem", f"pool {name}: {problem}", {})
        if kept.said and not problem:
            self._note(name, "pool.recovered", f"pool {name}: over: {kept.said}", {})
        kept.said = problem

    def _note(self, name: str, kind: str, text: str, data: Mapping[str, object]) -> None:
        self._fleet.events.own.add(
            at=self._fleet.clock.wall(),
            kind=kind,
            device_id="",
            slug=Slug(""),
            text=text,
            data={"pool": name} | dict(data),
        )
