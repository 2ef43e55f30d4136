"""The loop: observe, plan, act, say when to look again. The only one that joins both halves.

Level-triggered: a hint only says that it is worth looking; what is decided is decided on a registry
snapshot and a scheduler snapshot, both complete and at or past our own last writes (S8). Nothing per
device costs a task, a thread or a timer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from nomad_watchdog.core import planner
from nomad_watchdog.core.planner import Plan
from nomad_watchdog.errors import TransientError, WatchdogError
from nomad_watchdog.fleet import Fleet
from nomad_watchdog.follower import DOUBT_EVERY_S, Follower
from nomad_watchdog.ids import Slug
from nomad_watchdog.informer import Informer
from nomad_watchdog.leases import Leases, Undivided
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.migrations import Migrations
from nomad_watchdog.model import (
    Action,
    ActionKind,
    AgentSpec,
    DeviceRecord,
    Monotonic,
    Presence,
)
from nomad_watchdog.outlook import Outlook
from nomad_watchdog.performer import Performer
from nomad_watchdog.planning import Planning
from nomad_watchdog.rollouts import LOOK_EVERY_S, Rollouts
from nomad_watchdog.schedulers import Scheduler, Snapshot
from nomad_watchdog.territory import Territory
from nomad_watchdog.upkeep import Upkeep, every
from nomad_watchdog.workqueue import WorkQueue

log = logging.getLogger(__name__)

NEVER_LOOKED: Final = Monotonic(float("-inf"))
CONFIRM_AFTER_S: Final = 2.0
"""S7: how long after the first read the second one is taken."""
QUICK: Final = 64
"""Up to so many changed records start at once without waiting for a pass: a start needs no breaker."""


class Reconciler:
    """Keeps exactly one agent per present device, for one installation."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        specs: Mapping[str, AgentSpec],
        metrics: Metrics,
        leases: Leases | None = None,
    ) -> None:
        self.fleet = fleet
        self.leases = leases or Undivided()
        self.territory = Territory(self.leases)
        self.scheduler = scheduler
        self.rollouts = Rollouts(fleet, specs, self.leases, metrics)
        self.specs = dict(specs)
        """In force; the performer and the upkeep look into the same one."""
        self.metrics = metrics
        self.hashes = {name: spec.spec_hash for name, spec in specs.items()}
        self.queue: WorkQueue[Slug, Action] = WorkQueue(fleet.clock)
        self.performer = Performer(
            fleet, scheduler, self.specs, self.queue, self._done, leases=self.leases
        )
        self.migrations = Migrations(fleet, scheduler, self.territory, metrics, self._look_anew)
        self.planning = Planning(
            fleet, self.territory, self.rollouts, self.hashes, metrics, self.migrations
        )
        self.breaker = self.planning.breaker
        self.last_plan = Plan(())
        self.follower = Follower(fleet, self.territory, metrics, self._taken, self.migrations)
        self.informer = Informer(
            scheduler, fleet.clock, fleet.limits.resync_s, metrics, self._take, self._not_seen
        )
        self._wake = asyncio.Event()
        self._observed = False
        self._no_room = ""
        self._full: Mapping[str, str] = {}
        self._changed_at: dict[Slug, Monotonic] = {}
        fleet.observe_with(self, self.metrics.report)
        fleet.plan_view = self.planning.view
        self._show()

    def _show(self) -> None:
        """Let the fleet ask what comes next, and what is in the way."""
        outlook = Outlook(
            fleet=self.fleet,
            backend=self.scheduler.name,
            hashes=self.hashes,
            queue=self.queue,
            performer=self.performer,
            breaker=self.breaker,
            informer=self.informer,
            leases=self.leases,
            territory=self.territory,
            last_plan=lambda: self.last_plan,
            no_room=lambda: self._no_room,
            homes=self.migrations.homes,
            blind=self.migrations.blind,
        )
        self.fleet.obstacle = outlook.obstacle
        self.fleet.status_parts.append(outlook.status)
        self.fleet.explain_parts.append(outlook.explain)

    # -- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reconcile until cancelled."""
        await self._roll()
        await self._patiently(lambda: self.scheduler.prepare(list(self.specs.values())), "prepare")
        upkeep = Upkeep(
            fleet=self.fleet,
            scheduler=self.scheduler,
            specs=self.specs,
            metrics=self.metrics,
            queue=self.queue,
            performer=self.performer,
            informer=self.informer,
            leases=self.leases,
            territory=self.territory,
            wake=self._wake.set,
            waits_for_room=lambda: bool(
                self._no_room or self._full or self.last_plan.waiting_rollout
            ),
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(self.follower.run())
            group.create_task(self._take_over())
            group.create_task(self.informer.run())
            group.create_task(self._pass_when_woken())
            for timer in upkeep.timers():
                group.create_task(timer)
            if self.rollouts.on:
                group.create_task(every(LOOK_EVERY_S, self._roll))
            if self.migrations.on:
                group.create_task(every(LOOK_EVERY_S, self._follow_migration))
            group.create_task(every(DOUBT_EVERY_S, self.follower.doubt))
            group.create_task(self.performer.run())

    async def _patiently(self, call: Callable[[], object], what: str) -> None:
        """Repeat a call that may fail for now; a lasting refusal is raised."""
        delay_s = 0.5
        while True:
            try:
                await call()  # type: ignore[misc]  # a Callable[[], Awaitable] by its only uses
            except TransientError as error:
                log.warning("will try again", extra={"action": what, "reason": str(error)})
                self.fleet.ready_reason = f"{what}: {error}"
                await asyncio.sleep(error.retry_after_s or delay_s)
                delay_s = min(delay_s * 2, 10.0)
            else:
                return

    async def _follow_migration(self) -> None:
        if await self.migrations.look():
            self._wake.set()

    def _look_anew(self) -> None:
        """More schedulers have agents than those that were looked at: nothing is decided until all were."""
        self.territory.looked_at = NEVER_LOOKED
        self.informer.resync("migration", now=True)

    async def _roll(self) -> None:
        """Go by the versions that are in force now: the scheduler is prepared for them first."""
        if await self.rollouts.look():
            self._wake.set()
        specs = self.rollouts.specs()
        if self.planning.behind_rollouts():
            try:
                await self.scheduler.prepare(list(specs.values()))
            except WatchdogError as error:
                log.warning("prepare failed", extra={"reason": str(error)})
                return
            self.specs.update(specs)
            self.hashes.update({name: spec.spec_hash for name, spec in specs.items()})
            self._wake.set()

    # -- observe --------------------------------------------------------------------------------

    def records_changed(self, records: Sequence[DeviceRecord]) -> None:
        """Records were stored or read; the few that only need a start get it at once."""
        now = self.fleet.clock.monotonic()
        self.migrations.seen(records)
        for record in records:
            self._changed_at.setdefault(record.slug, now)
        unseen = self.informer.freshness.learned(records)
        # What we are acting on is looked at when the action is done.
        if unseen := {slug for slug in unseen if not self.queue.is_active(slug)}:
            self.informer.look_again(unseen)
        if self.follower.has_read and self._observed and len(records) <= QUICK:
            ours = self.territory.shards()
            for record in records:
                if self.territory.shard(record.slug) in ours:
                    self._start_quickly(record)
        # Epochs that we raise ourselves are no news: the outcome of the action is.
        if not records or not all(self.queue.is_active(record.slug) for record in records):
            self._wake.set()

    def _start_quickly(self, record: DeviceRecord) -> None:
        found = self.fleet.placements.get(record.slug, ())
        if record.presence is not Presence.PRESENT or self._undecided(record.slug) or self._no_room:
            return
        if self.migrations.unsure({record.slug: record}):
            return
        for action in planner.decide(record, found, self.hashes, self.migrations.homes()):
            premature = self.informer.freshness.premature(action)
            full = action.home in self._full
            if action.kind is ActionKind.START and not premature and not full:
                self.queue.put(record.slug, action, urgent=True)

    def look_again(self, slug: Slug) -> None:
        """Read the placements of one device soon."""
        self.informer.look_again({slug})

    def is_behind(self, slug: Slug) -> bool:
        """Whether the placements known of a device are older than its record (S8)."""
        return self.informer.freshness.is_behind(slug)

    def rivals(self, slug: Slug, instance: str) -> bool:
        """Whether this instance is heard of for the first time beside the accepted one: then the device is
        listed anew before one of them is refused (S8)."""
        first = self.informer.freshness.rivals(slug, instance)
        if first:
            self.informer.look_again({slug})
        return first

    async def _take_over(self) -> None:
        """Look at both stores anew for each shard that becomes ours: its last holder may have acted after
        what we know (S8)."""
        while True:
            await self.leases.changed.wait()
            self.leases.changed.clear()
            if self.territory.unseen():
                self.informer.resync("lease", now=True)
                try:
                    await self.follower.read()
                except WatchdogError as error:
                    log.warning("registry read failed", extra={"reason": str(error)})
                    await asyncio.sleep(0.2)
                    self.leases.changed.set()
            self._wake.set()

    def _taken(self, news: bool) -> None:
        if news:
            self._wake.set()
        self._say_if_ready()

    def _say_if_ready(self) -> None:
        if self.follower.has_read and self._observed:
            self.fleet.ready_event.set()
            self.fleet.ready_reason = ""

    def _not_seen(self, reason: str) -> None:
        if not self._observed:
            self.fleet.ready_reason = reason

    def _take(self, snapshot: Snapshot) -> None:
        fleet = self.fleet
        if snapshot.only is None:
            fleet.placements = dict(snapshot.placements)
            self._observed = True
            self.territory.looked_at = self.informer.began_at
        else:
            for slug in snapshot.only:
                found = snapshot.placements.get(slug)
                if found:
                    fleet.placements[slug] = found
                else:
                    fleet.placements.pop(slug, None)
        self.performer.remember_stops(self.informer.read_began_at)
        seen = snapshot.only if snapshot.only is not None else list(self.performer.expectations)
        for slug in seen:
            if slug in snapshot.behind:
                continue
            expected = self.performer.expectations.get(slug)
            if expected is not None and snapshot.index >= expected.index:
                # Shown, or a phantom: either way the planner may decide again.
                del self.performer.expectations[slug]
        for slug in snapshot.only or ():
            if slug in fleet.records:
                fleet.refresh(slug)
        self._say_if_ready()
        self._wake.set()

    # -- plan -----------------------------------------------------------------------------------

    def _undecided(self, slug: Slug) -> bool:
        return (
            slug in self.performer.expectations
            or self.queue.is_active(slug)
            or self.fleet.is_resting(slug)
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
                await self._read_again()
            if any(a.kind is ActionKind.START for a in self.last_plan.actions):
                await self._ask_for_room()
            # A pass may cost about a twentieth of the time: while it thinks, no answer is read.
            await asyncio.sleep(min(19 * took_s, 2.0))

    def reconcile(self) -> Plan:
        """One pass: decide for every device and hand the actions to the queue. No I/O."""
        plan = self.planning.make(self.breaker.confirmed)
        actions = [a for a in plan.actions if not self._undecided(a.slug)]
        urgent = len(actions) <= QUICK // 2
        wanted: set[Slug] = set()
        freshness = self.informer.freshness
        for action in actions:
            if action.kind is ActionKind.START and (self._no_room or action.home in self._full):
                continue
            if freshness.premature(action):
                self.informer.look_again({action.slug})
                continue
            wanted.add(action.slug)
            self.queue.put(action.slug, action, urgent=urgent)
        self.queue.retain(wanted)
        self.planning.hold(plan)
        self.last_plan = plan
        self.metrics.queue(len(self.queue), self.queue.oldest_s())
        return plan

    async def _read_again(self) -> None:
        """The second read of S7: both stores again, in full, a while after the first."""
        await asyncio.sleep(CONFIRM_AFTER_S)
        held = self.breaker.held
        try:
            await self.follower.read()
            await self.informer.read()
        except WatchdogError as error:
            log.warning("second read failed", extra={"reason": str(error)})
            self._wake.set()
            return
        self.breaker.read_again(held, self.fleet.records)
        self._wake.set()

    def hold_now(self) -> None:
        """Hold what the views of this moment would stop. A plan that is shown is made of them, and the last
        pass may be some seconds older: what an operator was shown is what can be confirmed."""
        self.planning.hold(self.planning.make(self.breaker.confirmed))

    def confirm_stops(self) -> int:
        """An operator's word that all held stops are meant. Returns how many."""
        count = self.breaker.confirm()
        self._wake.set()
        return count

    async def _ask_for_room(self) -> None:
        try:
            capacity = await self.scheduler.capacity()
        except WatchdogError as error:
            log.warning("capacity unknown", extra={"reason": str(error)})
            return
        if self._full.keys() - capacity.full.keys():
            self._wake.set()
        self._full = capacity.full
        was, self._no_room = self._no_room, "" if capacity.room else capacity.reason
        if self._no_room:
            if not was:
                log.warning("starts held back", extra={"reason": capacity.reason})
        elif was:
            self._wake.set()

    def _done(self, action: Action, outcome: str, took_s: float) -> None:
        self.metrics.action(action.kind.value, outcome)
        began = self._changed_at.pop(action.slug, None)
        if outcome == "ok" and action.kind is ActionKind.START and began is not None:
            self.metrics.event_to_dispatch(self.fleet.clock.monotonic() - began)
        if outcome == "ok":
            record = self.fleet.records.get(action.slug)
            as_wished = record is not None and record.presence is Presence.PRESENT
            # Calm when nothing follows: an agent for a device that is there, none for one that has left.
            calm = as_wished == (action.kind is not ActionKind.RETIRE)
            self.informer.look_again({action.slug}, calm=calm)
        else:
            self._wake.set()
        log.debug(
            "action done",
            extra={
                "slug": action.slug,
                "action": action.kind.value,
                "outcome": outcome,
                "took_s": round(took_s, 4),
            },
        )
