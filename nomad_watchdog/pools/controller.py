"""The controller of the worker pools of one installation: reads their metrics, decides, and scales them.

Only the leader, the holder of shard 0, acts, so that two replicas never scale one pool; while the lease is in
doubt no replica acts. A new leader has no history of a pool, and without one a pool grows but does not shrink
(`core.pool_scaling`). Each pool has its own task, so that one slow metric does not delay other pools (S9).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypedDict

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
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.pools import Driver, PoolStatus
from nomad_watchdog.pools.metric_reader import MetricReader, Reading
from nomad_watchdog.replicas.leases import Leases
from nomad_watchdog.replicas.ownership import is_leader

log = logging.getLogger(__name__)

MIN_WAIT_S: Final = 0.1


@dataclass(slots=True)
class _PoolState:
    """The state of one pool on this replica."""

    scaling: ScalingState = field(default_factory=ScalingState)
    status: PoolStatus | None = None
    reading: Reading = field(default_factory=lambda: Reading(None, "not read yet"))
    decision: ScalingDecision | None = None
    problem: str = ""
    reported_problem: str = ""
    """The problem that an event was published for."""
    reported_count: int | None = None
    """The number of workers in the last event of a dry run."""


class PoolRow(TypedDict, total=False):
    """A pool as the API returns it. Those that are not configured have only the first fields and `problem`."""

    name: str
    configured: bool
    count: int
    running: int
    workers: list[str]
    min: int
    max: int
    scaler: str
    dry_run: bool
    metric: str
    target: float | None
    value: float | None
    advised: int | None
    reason: str
    problem: str


class PoolController:
    """`pools`: the configured ones. Other pools that the driver lists are displayed but not changed."""

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
        self._metric_reader = MetricReader(
            driver, lambda: {s.value: n for s, n in fleet.verdicts.counts().items()}
        )
        self._states = {name: _PoolState() for name in pools}
        metrics.pools(pools)

    def is_leader(self) -> bool:
        """Whether this replica manages the pools."""
        return is_leader(self._leases)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._driver.run(self.is_leader))
                for name in self.pools:
                    group.create_task(self._run_pool(name))
        finally:
            await self._metric_reader.close()

    async def _run_pool(self, name: str) -> None:
        state = self._states[name]
        while True:
            if self.is_leader():
                await self.reconcile(name)
            else:
                state.scaling, state.decision, state.problem = ScalingState(), None, ""
            self._update_metrics(name)
            await asyncio.sleep(max(MIN_WAIT_S, self.pools[name].interval))

    async def reconcile(self, name: str) -> None:
        """Create or update one pool, read its metric, and scale it if necessary."""
        pool, state = self.pools[name], self._states[name]
        try:
            await self._driver.ensure(name, pool)
            state.status = status = await self._driver.status(name)
            problem = status.problem if status is not None else "the scheduler does not list it yet"
            if status is not None and pool.metric:
                state.reading = await self._metric_reader.read(name, pool)
                problem = problem or state.reading.reason
            if status is not None and pool.scaler == "builtin":
                await self._scale_by_metric(name, status)
        except ConflictError as error:
            # The workers are being replaced. This is no problem, and one of the next passes will scale the pool.
            log.info("pool not scaled yet", extra={"pool": name, "reason": str(error)})
            problem = state.problem
        except WatchdogError as error:
            problem = str(error)
        except Exception as error:  # a bug must affect only this pool, not the control plane (S9)
            log.exception("pool crashed", extra={"pool": name})
            problem = f"internal error: {type(error).__name__}"
        self._note_problem(name, problem)

    async def _scale_by_metric(self, name: str, status: PoolStatus) -> None:
        state, clock = self._states[name], self._fleet.clock
        rules = self.pools[name].rules()
        found = pool_scaling.decide(
            rules, status.count, state.reading.value, state.scaling, clock.monotonic()
        )
        state.decision, state.scaling = found, found.memory
        if found.dry_run:
            self._note_dry_run(name, status.count, found)
        if not found.acts or not self.is_leader():
            return
        await self._driver.scale(name, found.count, found.reason)
        state.scaling = pool_scaling.changed(found.memory, found.count, clock.monotonic())
        self._metrics.pool_scaled(name, str(found.verb))
        self._note_scaled(name, status.count, found.count, found.reason)

    # requests of operators

    async def scale(self, name: str, count: int, by: str) -> None:
        """Set the number of workers. Raises NotFoundError, UserError for a number outside the bounds, and
        PreconditionError for a pool with an external scaler."""
        pool = self.pools.get(name)
        if pool is None:
            raise NotFoundError(f"no pool {name!r} in the configuration")
        if pool.scaler == "external":
            raise PreconditionError(
                f'pool {name!r} has scaler = "external"; scale it with that scaler'
            )
        if not pool.min <= count <= pool.max:
            raise UserError(f"{count} workers: pool {name!r} allows {pool.min} to {pool.max}")
        status = await self._driver.status(name)
        await self._driver.scale(name, count, by)
        self._note_scaled(name, status.count if status else 0, count, by)

    async def remove(self, name: str) -> None:
        """Stop a pool that is no longer configured. Raises PreconditionError for a configured pool, which would be
        created again, and NotFoundError when there is no such pool."""
        if name in self.pools:
            raise PreconditionError(f"pool {name!r} is configured; remove its block first")
        if await self._driver.status(name) is None:
            raise NotFoundError(f"no pool {name!r}")
        await self._driver.remove(name)
        self._note(name, "pool.removed", f"pool {name} was removed", {})

    # displayed state

    async def rows(self) -> list[PoolRow]:
        """All pools for the API, sorted by name, including those of an older configuration."""
        found = await self._driver.list_pools()
        return [self._row(name, found.get(name)) for name in sorted({*self.pools, *found})]

    def _row(self, name: str, status: PoolStatus | None) -> PoolRow:
        pool, state = self.pools.get(name), self._states.get(name)
        row: PoolRow = {
            "name": name,
            "configured": pool is not None,
            "count": status.count if status else 0,
            "running": status.running if status else 0,
            "workers": list(status.workers) if status else [],
        }
        if pool is None or state is None:
            return {**row, "problem": "not configured; `pools rm` stops it"}
        decision = state.decision
        return {
            **row,
            "min": pool.min,
            "max": pool.max,
            "scaler": pool.scaler,
            "dry_run": pool.dry_run,
            "metric": pool.metric[0].kind if pool.metric else "",
            "target": pool.metric[0].target if pool.metric else None,
            "value": state.reading.value,
            "advised": decision.advised if decision else None,
            "reason": decision.reason if decision else "",
            "problem": state.problem,
        }

    def _update_metrics(self, name: str) -> None:
        state, leads = self._states[name], self.is_leader()
        decision, status = state.decision, state.status
        self._metrics.pool(
            name,
            wanted=status.count if status and leads else 0,
            running=status.running if status and leads else 0,
            advised=decision.advised if decision and leads else 0,
            problem=bool(state.problem) and leads,
        )
        if (
            decision is not None
            and decision.why is not ScalingReason.NO_METRIC
            and state.reading.value is not None
        ):
            self._metrics.pool_value(name, state.reading.value)

    # events

    def _note_scaled(self, name: str, before: int, count: int, reason: str) -> None:
        log.info("pool scaled", extra={"pool": name, "before": before, "count": count})
        text = f"pool {name} scaled from {before} to {count} workers: {reason}"
        self._note(name, "pool.scaled", text, {"before": before, "count": count})

    def _note_dry_run(self, name: str, count: int, found: ScalingDecision) -> None:
        state = self._states[name]
        goal = found.count if found.count != count else None
        if goal is not None and goal != state.reported_count:
            text = f"pool {name} would be scaled from {count} to {goal} workers: {found.reason}"
            self._note(name, "pool.would_scale", text, {"before": count, "count": goal})
        state.reported_count = goal

    def _note_problem(self, name: str, problem: str) -> None:
        """Publish an event when a problem begins and when it ends, not in every pass."""
        state = self._states[name]
        state.problem = problem
        if problem and not state.reported_problem:
            log.warning("pool has a problem", extra={"pool": name, "reason": problem})
            self._note(name, "pool.problem", f"pool {name}: {problem}", {})
        if state.reported_problem and not problem:
            text = f"pool {name} recovered from: {state.reported_problem}"
            self._note(name, "pool.recovered", text, {})
        state.reported_problem = problem

    def _note(self, name: str, kind: str, text: str, data: Mapping[str, object]) -> None:
        self._fleet.events.note_fleet(kind, text, {"pool": name, **data})
