"""The reconciler: keeps exactly one agent per present device.

What happens to one device, in the order of this module: its record changes (`records_changed`), a pass decides on it
(`reconcile`), the executor performs the action, and `_done` handles the outcome.

Level-triggered: a hint only starts a pass. A pass decides on a snapshot of the registry and one of the scheduler, both
complete and at or past our own last writes (S8). No device has a task, a thread or a timer of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from nomad_watchdog.controllers.agents.capacity import CapacityMonitor
from nomad_watchdog.controllers.agents.executor import ActionExecutor
from nomad_watchdog.controllers.agents.explain import LoopStatus
from nomad_watchdog.controllers.agents.periodic import PeriodicJobs, every, follow
from nomad_watchdog.controllers.agents.placement_informer import PlacementInformer
from nomad_watchdog.controllers.agents.plan_builder import PlanBuilder
from nomad_watchdog.controllers.agents.prepared_classes import PreparedClasses, ReadSpecs
from nomad_watchdog.controllers.agents.record_informer import DOUBT_EVERY_S, RecordInformer
from nomad_watchdog.controllers.agents.workqueue import WorkQueue
from nomad_watchdog.controllers.class_set import Place, unchanged
from nomad_watchdog.controllers.condition_writer import ConditionWriter
from nomad_watchdog.controllers.migration import MigrationController
from nomad_watchdog.controllers.movers import Movers
from nomad_watchdog.controllers.rollout import POLL_S
from nomad_watchdog.core import planner
from nomad_watchdog.core.actions import Action, ActionKind, ActionOutcome, Move
from nomad_watchdog.core.planner import Plan
from nomad_watchdog.core.rollout_steps import Strategy
from nomad_watchdog.errors import TransientError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, DeviceRecord, Monotonic, Presence
from nomad_watchdog.replicas.leases import Leases, SoleOwner
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import Scheduler, Snapshot

log = logging.getLogger(__name__)

NEVER_LOOKED: Final = Monotonic(float("-inf"))
CONFIRM_AFTER_S: Final = 2.0
"""Seconds between the first read and the second one, which a mass stop needs (S7)."""
QUICK: Final = 64
"""Maximum number of changed records that are started at once, without a pass."""


class Reconciler:
    """The reconciler of one installation, and its components."""

    def __init__(  # noqa: PLR0913  # each but the first four has a default
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        specs: Mapping[str, AgentSpec],
        metrics: Metrics,
        leases: Leases | None = None,
        *,
        read_specs: ReadSpecs | None = None,
        unreadable: Mapping[str, str] | None = None,
        place: Place = unchanged,
        strategies: Mapping[str, Strategy] | None = None,
    ) -> None:
        """`unreadable`, `read_specs`, `place` and `strategies`: as of `PreparedClasses`."""
        self.fleet = fleet
        self.scheduler = scheduler
        self.metrics = metrics
        self.leases = leases = leases or SoleOwner()
        self.ownership = ShardOwnership(leases)
        self.classes = PreparedClasses(
            fleet, scheduler, specs, metrics, leases, self.ownership,
            read_specs=read_specs, unreadable=unreadable, place=place, strategies=strategies,
        )  # fmt: skip
        self.capacity = CapacityMonitor(scheduler)
        self.queue: WorkQueue[Slug, Action] = WorkQueue(fleet.clock)
        self.executor = ActionExecutor(
            fleet, scheduler, self.classes.specs, self.queue, self._done, leases, self.classes.addresses.adapt,
            spec_for=self.classes.spec_for,
        )  # fmt: skip
        self.migrations = MigrationController(
            fleet, scheduler, self.ownership, metrics, self._read_all_again
        )
        self.movers = Movers(fleet, scheduler, self.ownership, self.classes, metrics, self.capacity)
        self.executor.avoids.append(self.movers.rebalances.avoid)
        self.plan_builder = PlanBuilder(
            fleet, self.ownership, self.classes, metrics, self.migrations, self.capacity,
            sources=self.movers.sources(), is_active=self.queue.is_active, in_hand=self.queue.in_hand,
        )  # fmt: skip
        self.breaker = self.plan_builder.breaker
        self.conditions = ConditionWriter(fleet, self.ownership, leases)
        self.follower = RecordInformer(
            fleet, self.ownership, metrics, self._records_read, self.migrations
        )
        self.informer = PlacementInformer(
            scheduler, fleet.clock, fleet.limits.resync_s, metrics, self._apply_snapshot, self._not_read
        )  # fmt: skip
        self.periodic = PeriodicJobs(
            fleet, scheduler, self.classes, metrics, self.queue, self.executor, self.informer, leases,
            self.ownership, self.plan_builder, self.wake, self.follower.doubt_at_once,
        )  # fmt: skip
        self._loop_status = LoopStatus(
            fleet, scheduler.name, self.classes, self.queue, self.executor, self.informer, leases,
            self.ownership, self.plan_builder, self.migrations,
        )  # fmt: skip
        self._wake = asyncio.Event()
        self._observed = False
        """A complete snapshot of the scheduler has been applied."""
        self._changed_at: dict[Slug, Monotonic] = {}
        self._connect()

    def _connect(self) -> None:
        """Connect the components with each other and with the fleet."""
        fleet, metrics = self.fleet, self.metrics
        self.classes.changed.connect(self.wake)
        self.classes.repaired.connect(self.executor.end_backoff)
        self.executor.ended.connect(self.classes.rollouts.action_ended)
        fleet.attach(self)
        fleet.reports.judged.connect(metrics.report)
        metrics.hosts.ratios = fleet.hosts.ratios
        fleet.views.add_status(self._loop_status.status)
        fleet.views.add_explain(self._loop_status.explain)

    def wake(self) -> None:
        """Have a pass made soon."""
        self._wake.set()

    # -- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reconcile until cancelled."""
        await self._patiently(self.classes.start, "read the roll-outs")
        await self._patiently(self.classes.prepare, "prepare")
        async with asyncio.TaskGroup() as group:
            group.create_task(self.follower.run())
            group.create_task(self._take_over())
            group.create_task(self.conditions.run())
            group.create_task(self.informer.run())
            group.create_task(self._pass_when_woken())
            for timer in self.periodic.timers():
                group.create_task(timer)
            group.create_task(self.classes.remember())
            group.create_task(every(POLL_S, self._follow_classes))
            group.create_task(follow(POLL_S, self.movers.rebalances.poll, self.wake))
            if self.migrations.on:
                group.create_task(follow(POLL_S, self.migrations.poll, self.wake))
            group.create_task(every(DOUBT_EVERY_S, self.follower.doubt))
            group.create_task(self.executor.run())

    async def _patiently(self, call: Callable[[], Awaitable[None]], what: str) -> None:
        """Repeat a call while its errors are transient; others are raised."""
        delay_s = 0.5
        while True:
            try:
                await call()
            except TransientError as error:
                log.warning("will try again", extra={"action": what, "reason": str(error)})
                self.fleet.readiness.waits_for = f"{what}: {error}"
                await asyncio.sleep(error.retry_after_s or delay_s)
                delay_s = min(delay_s * 2, 10.0)
            else:
                return

    async def _follow_classes(self) -> None:
        if await self.classes.poll():
            self.wake()

    def _read_all_again(self) -> None:
        """Another scheduler has agents now: nothing is decided until all schedulers were read."""
        self.ownership.looked_at = NEVER_LOOKED
        self.informer.resync("migration", now=True)

    async def _take_over(self) -> None:
        """For each shard that becomes ours, have the scheduler prepared and read both stores again: its last holder
        may have acted after our last read (S8)."""
        while True:
            await self.leases.changed.wait()
            self.leases.changed.clear()
            if self.classes.is_due() and not await self.classes.prepare_taken():
                self.leases.changed.set()
            if self.ownership.unseen():
                self.informer.resync("lease", now=True)
                try:
                    await self.follower.read()
                except WatchdogError:
                    self.follower.doubt_at_once()
                    await asyncio.sleep(0.2)
                    self.leases.changed.set()
            self.wake()

    # -- observe --------------------------------------------------------------------------------

    def records_changed(self, records: Sequence[DeviceRecord]) -> None:
        """Records were stored or read. A few that only need a start get it at once."""
        now = self.fleet.clock.monotonic()
        self.migrations.seen(records)
        for record in records:
            self._changed_at.setdefault(record.slug, now)
        unseen = self.informer.freshness.learned(records)
        # What we are acting on is looked at when the action is done.
        if unseen := {slug for slug in unseen if not self.queue.is_active(slug)}:
            self.informer.look_again(unseen)
        if self.follower.has_read and self._observed and len(records) <= QUICK:
            ours = self.ownership.shards()
            for record in records:
                if self.ownership.shard(record.slug) in ours:
                    self._start_quickly(record)
        # Epochs that we raise ourselves are no news: the outcome of the action is.
        if not records or not all(self.queue.is_active(record.slug) for record in records):
            self.wake()

    def _start_quickly(self, record: DeviceRecord) -> None:
        found = self.fleet.placements.get(record.slug, ())
        if record.presence is not Presence.PRESENT or self._undecided(record.slug):
            return
        if self.migrations.unsure({record.slug: record}):
            return
        for action in planner.decide(record, found, self.plan_builder.goals()):
            if action.kind is ActionKind.START:
                self._enqueue(action, urgent=True)

    def _records_read(self, news: bool) -> None:
        if news:
            self.wake()
        self._set_ready()

    def _set_ready(self) -> None:
        if self.follower.has_read and self._observed:
            if not self.fleet.readiness.event.is_set():
                # A scrape right after a restart must not see 0 devices offline: alerts would resolve.
                self.periodic.judge()
            self.fleet.readiness.event.set()
            self.fleet.readiness.waits_for = ""

    def _not_read(self, reason: str) -> None:
        if not self._observed:
            self.fleet.readiness.waits_for = reason

    def _apply_snapshot(self, snapshot: Snapshot) -> None:
        fleet = self.fleet
        fleet.apply_placements(snapshot.placements, snapshot.only)
        if snapshot.only is None:
            self._observed = True
            self.ownership.looked_at = self.informer.began_at
            self.movers.hosts.seen(snapshot.closed_hosts)
        self.plan_builder.waiting.seen(snapshot.placements, snapshot.only, fleet.clock.monotonic())
        self.executor.remember_stops(self.informer.read_began_at)
        seen = snapshot.only if snapshot.only is not None else list(self.executor.expectations)
        for slug in seen:
            if slug in snapshot.behind:
                continue
            expected = self.executor.expectations.get(slug)
            if expected is not None and snapshot.index >= expected.index:
                # The start is listed, or it has no effect: either way the planner may decide again.
                del self.executor.expectations[slug]
        for slug in snapshot.only or ():
            if slug in fleet.records:
                fleet.verdicts.judge(slug)
        self._set_ready()
        self.wake()

    # -- decide ---------------------------------------------------------------------------------

    def _undecided(self, slug: Slug) -> bool:
        """Whether nothing may be decided for a device now: an action of it is in progress, or it is paused."""
        return (
            slug in self.executor.expectations
            or self.queue.is_active(slug)
            or self.fleet.presence.is_resting(slug)
        )

    async def _pass_when_woken(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not (self.follower.has_read and self._observed):
                continue
            began = self.fleet.clock.monotonic()
            self.reconcile()
            took_s = self.fleet.clock.monotonic() - began
            self.metrics.passed("ok" if not self.breaker.held else "held", took_s)
            if self.breaker.wants_second_read:
                await self._second_read()
            starts = any(
                a.kind is ActionKind.START or a.move is Move.STALLED
                for a in self.plan_builder.last.actions
            )
            if (starts or self.capacity.is_short()) and await self.capacity.read():
                self.wake()
            # A pass takes at most about a twentieth of the time: while it computes, no answer is read.
            await asyncio.sleep(min(19 * took_s, 2.0))

    def reconcile(self) -> Plan:
        """One pass: decide for every device and hand the actions to the queue. No I/O."""
        self.movers.drains.look()
        plan = self.plan_builder.make(self.breaker.confirmed)
        actions = [a for a in plan.actions if not self._undecided(a.slug)]
        urgent = len(actions) <= QUICK // 2
        self.queue.retain({a.slug for a in actions if self._enqueue(a, urgent=urgent)})
        for action in set(plan.refused) - set(self.plan_builder.last.refused):
            log.error("unsafe start refused", extra={"slug": action.slug, "epoch": action.epoch})
            self.metrics.unsafe_start()
        self.plan_builder.hold(plan)
        self.plan_builder.last = plan
        self.metrics.queue(len(self.queue), self.queue.oldest_s())
        return plan

    def _enqueue(self, action: Action, *, urgent: bool) -> bool:
        """Have an action performed, unless it must wait for room or for the next read of the scheduler."""
        if self.capacity.blocks(action):
            return False
        if self.informer.freshness.premature(action):
            self.informer.look_again({action.slug})
            return False
        self.queue.put(action.slug, action, urgent=urgent)
        return True

    async def _second_read(self) -> None:
        """Read both stores completely once more, some seconds after a mass stop was put on hold (S7)."""
        await asyncio.sleep(CONFIRM_AFTER_S)
        held = self.breaker.held
        try:
            await self.follower.read()
            await self.informer.read()
        except WatchdogError as error:
            log.warning("second read failed", extra={"reason": str(error)})
            self.wake()
            return
        self.breaker.read_again(held, self.fleet.records)
        self.wake()

    def _done(self, action: Action, outcome: ActionOutcome, took_s: float) -> None:
        """The executor has performed an action."""
        self.metrics.action(action.kind.value, outcome.value)
        began = self._changed_at.pop(action.slug, None)
        match outcome:
            case ActionOutcome.OK:
                now = self.fleet.clock.monotonic()
                if action.move is Move.STALLED:
                    self.plan_builder.waiting.given_up(action.slug, now)
                if began is not None and action.kind is ActionKind.START:
                    self.metrics.event_to_dispatch(now - began)
                self.informer.look_again({action.slug}, calm=self._is_final(action))
            case ActionOutcome.FENCED | ActionOutcome.FAILED:
                self.wake()
        facts = {"slug": action.slug, "action": action.kind.value, "outcome": outcome.value}
        log.debug("action done", extra=facts | {"took_s": round(took_s, 4)})

    def _is_final(self, action: Action) -> bool:
        """Whether no action follows: an agent was started for a present device, or stopped for one that has left."""
        record = self.fleet.records.get(action.slug)
        is_present = record is not None and record.presence is Presence.PRESENT
        return is_present == (action.kind is not ActionKind.RETIRE)

    def act_once(self) -> None:
        """For a command that runs once: it makes its own passes, and an action that has ended triggers nothing."""
        self.executor.ended.disconnect(self._done)

    # -- operators ------------------------------------------------------------------------------

    def hold_now(self) -> None:
        """Put on hold what a plan of this moment would stop. The plan that an operator has seen may be newer than the
        last pass, and must be what is confirmed."""
        self.plan_builder.hold(self.plan_builder.make(self.breaker.confirmed))

    def confirm_stops(self) -> int:
        """Permit all stops on hold; their number."""
        count = self.breaker.confirm()
        self.wake()
        return count

    # -- what the fleet asks --------------------------------------------------------------------

    def obstacle(self, slug: Slug) -> str:
        """Why the device cannot have an agent now; "" = it can."""
        return self._loop_status.obstacle(slug)

    def plan(self) -> dict[str, object]:
        """What the next pass would do, as JSON."""
        return self.plan_builder.view()

    def read_again(self, slug: Slug) -> None:
        """Read the placements of one device soon."""
        self.informer.look_again({slug})

    def is_behind(self, slug: Slug) -> bool:
        """Whether the placements known of a device are older than its record (S8)."""
        return self.informer.freshness.is_behind(slug)

    def is_new_rival(self, slug: Slug, instance: str) -> bool:
        """Whether this instance reports for the first time beside the accepted one. Then the placements of the device
        are read before one of them is refused (S8)."""
        first = self.informer.freshness.rivals(slug, instance)
        if first:
            self.informer.look_again({slug})
        return first
