"""What the loop does on a timer beside its passes: judge, tell the metrics, mend the parents, bury the dead."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.clients.prometheus import RolloutQueries
from nomad_watchdog.controllers.agents.executor import ActionExecutor
from nomad_watchdog.controllers.agents.placement_informer import PlacementInformer
from nomad_watchdog.controllers.agents.plan_builder import PlanBuilder
from nomad_watchdog.controllers.agents.prepared_classes import PreparedClasses
from nomad_watchdog.controllers.agents.workqueue import WorkQueue
from nomad_watchdog.core import tombstones
from nomad_watchdog.core.actions import Action
from nomad_watchdog.core.placement_gc import REST_S, TOMBSTONE_REST_S, PlacementGc
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import PlacementState
from nomad_watchdog.replicas.leases import Leases
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import Scheduler

log = logging.getLogger(__name__)

VERDICTS_EVERY_S: Final = 2.0
JUDGE_PER_COST: Final = 100.0
"""Times as long as a judgement of all took is waited before the next: time alone changes few verdicts."""
PRESENCE_EVERY_S: Final = 1.0
"""So late at most is seen that a grace or a pause has ended, or that another replica made one."""
PREPARE_FIRST_S: Final = 0.5
"""From the first start that fails because the scheduler is not prepared to the next `prepare`."""
SWEEP_EVERY_S: Final = 30.0
ANALYSE_EVERY_S: Final = 1.0
MAX_FORGOTTEN: Final = 2_000
"""Tombstones that are deleted at a time."""
LISTED_S: Final = (TOMBSTONE_REST_S - REST_S) / 2
"""Tombstones are deleted only on a listing of at most this age, in seconds: by then every request that was under
way when the tombstone came to rest has arrived (S3)."""
BUDGET_KEPT_S: Final = 3600.0
"""Nothing is remembered of a device that has neither been started nor failed to start for so long."""


async def every(period_s: float, call: Callable[[], Awaitable[object]]) -> None:
    """Call again and again until cancelled, with that many seconds between."""
    while True:
        await asyncio.sleep(period_s)
        await call()


async def follow(
    period_s: float, poll: Callable[[], Awaitable[bool]], wake: Callable[[], None]
) -> None:
    """As `every`, and call `wake` after each poll that has found a change."""
    while True:
        await asyncio.sleep(period_s)
        if await poll():
            wake()


@dataclass(frozen=True, slots=True)
class PeriodicJobs:
    """The parts of one reconciler that need it."""

    fleet: Fleet
    scheduler: Scheduler
    classes: PreparedClasses
    metrics: Metrics
    queue: WorkQueue[Slug, Action]
    executor: ActionExecutor
    informer: PlacementInformer
    leases: Leases
    ownership: ShardOwnership
    plan_builder: PlanBuilder
    wake: Callable[[], None]
    """Have a pass made soon."""
    doubt: Callable[[], None]
    """Have the registry read again: it did not answer as expected."""
    placement_gc: PlacementGc = field(default_factory=PlacementGc)

    def timers(self) -> Iterable[Coroutine[None, None, None]]:
        """What is to run as long as the loop does."""
        yield self._judge_for_ever()
        yield every(PRESENCE_EVERY_S, self.settle_presence)
        yield every(SWEEP_EVERY_S, self.sweep)
        yield self._prepare_for_ever()
        yield self._prepare_when_needed()
        yield self._analyse_for_ever()

    async def _analyse_for_ever(self) -> None:
        """Read the queries of roll-outs: apart from their judgement, which must not wait for a server."""
        async with RolloutQueries() as queries, asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(ANALYSE_EVERY_S)
                self.classes.rollouts.analyse(queries.read, group)

    async def _judge_for_ever(self) -> None:
        took_s = 0.0
        while True:
            await asyncio.sleep(max(VERDICTS_EVERY_S, JUDGE_PER_COST * took_s))
            began = self.fleet.clock.monotonic()
            self.judge()
            took_s = self.fleet.clock.monotonic() - began
            # Agents that got ready, or have lasted, make room in a roll-out's window.
            if self.plan_builder.waits_for_room():
                self.wake()

    def judge(self) -> None:
        """Judge every device, and tell the metrics how the fleet stands."""
        fleet, metrics = self.fleet, self.metrics
        fleet.verdicts.judge_all()
        paused = fleet.verdicts.paused_counts()
        tried = fleet.trials.outages(
            (slug, fleet.verdicts.last(slug)[0].state)
            for slug in fleet.trials.rollouts.keys() & fleet.records.keys()
            if not fleet.presence.is_resting(slug)
        )
        counts = fleet.verdicts.counts()
        metrics.devices({s.value: n - paused[s] - tried[s] for s, n in counts.items()})
        metrics.rollouts.outages(tried.total())
        metrics.attendance(
            flapping=fleet.presence.heartbeats.flapping(fleet.clock.monotonic()),
            paused=paused.total(),
        )
        states: dict[str, int] = dict.fromkeys(PlacementState, 0)
        for found in fleet.placements.values():
            for placement in found:
                states[placement.state] += 1
        metrics.placements(states)
        metrics.leases.shards(len(self.leases.terms()), self.leases.shards)
        metrics.snapshot_age(self.informer.age_s)
        metrics.queue(len(self.queue), self.queue.oldest_s())
        metrics.unheard(fleet.verdicts.unheard())
        metrics.unlisted(fleet.verdicts.totals.unlisted)
        metrics.stalled(self.plan_builder.stalls())
        metrics.incidents(fleet.recorder.incidents.open_by_kind())
        metrics.events(fleet.recorder.status_of_store())
        metrics.events_left_out(fleet.events.limits.total)

    async def settle_presence(self) -> None:
        """See which graces and pauses have ended or begun, and have a pass made for it."""
        try:
            changed = await self.fleet.presence.pauses.refresh()
        except WatchdogError:
            changed = False  # the last view stands
            self.doubt()  # reports the reason, once
        if self.fleet.presence.expire() or changed:
            self.wake()

    async def _prepare_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.fleet.limits.resync_s)
            await self.prepare_again()

    async def prepare_again(self) -> None:
        """Level-triggered too: what an operator purged or changed by hand is put right (L2)."""
        if not self.leases.terms():
            return
        try:
            await self.classes.prepare_again()
        except WatchdogError as error:
            log.warning("prepare failed", extra={"reason": str(error)})
        else:
            self.executor.end_backoff()

    async def _prepare_when_needed(self) -> None:
        """Prepare soon after a start failed for want of it, and then less and less often while that goes on:
        the devices' own back-off ends with the repair."""
        needed = self.executor.needs_preparation
        pause_s, ended = PREPARE_FIRST_S, float("-inf")
        while True:
            needed.clear()
            await needed.wait()
            now = self.fleet.clock.monotonic()
            calm = now - ended > self.fleet.limits.resync_s
            pause_s = PREPARE_FIRST_S if calm else min(2 * pause_s, self.fleet.limits.resync_s)
            await asyncio.sleep(pause_s)
            await self.prepare_again()
            ended = self.fleet.clock.monotonic()

    async def _forget_tombstones(self) -> None:
        """Delete the records of devices that left long ago."""
        fleet = self.fleet
        if not fleet.readiness.ready or self.informer.age_s > LISTED_S:
            return
        ours = self.ownership.of(fleet.records)
        ttl_s, now = fleet.limits.tombstone_ttl_s, fleet.clock.wall()
        dead = PlacementState.DEAD
        placed = fleet.placements.items()
        listed = {slug for slug, found in placed if any(one.state is not dead for one in found)}
        due = tombstones.expired(ours.values(), listed, now, ttl_s, MAX_FORGOTTEN)
        old = self.placement_gc.rested(due, fleet.clock.monotonic())
        try:
            count = await fleet.records.forget(old)
        except WatchdogError as error:
            log.warning("tombstones not deleted", extra={"reason": str(error)})
            return
        if count:
            log.info("tombstones deleted", extra={"count": count})

    async def sweep(self) -> None:
        """Have the scheduler forget some dead placements, and forget what nobody asks for any more."""
        now = self.fleet.clock.monotonic()
        placements = self.ownership.of(self.fleet.placements)
        dead = self.placement_gc.due(self.fleet.records, placements, now)
        if dead:
            try:
                await self.scheduler.sweep(dead)
            except WatchdogError as error:
                log.warning("sweep failed", extra={"reason": str(error)})
        await self._forget_tombstones()
        self.informer.freshness.forget(self.fleet.records.keys())
        budgets = self.executor.budgets
        # A back-off is forgotten by `RetryBudget.failed` first: a device that never started keeps its own.
        kept_s = max(BUDGET_KEPT_S, 2 * self.fleet.limits.backoff_max_s)
        for slug, budget in list(budgets.items()):
            if budget.is_idle(now, kept_s):
                del budgets[slug]
