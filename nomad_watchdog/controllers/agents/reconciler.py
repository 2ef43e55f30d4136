"""The loop: observe, plan, act, say when to look again. The only one that joins both halves.

Level-triggered: a hint only says that it is worth looking; what is decided is decided on a registry
snapshot and a scheduler snapshot, both complete and at or past our own last writes (S8). Nothing per
device costs a task, a thread or a timer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from nomad_watchdog.config.spec_history import SpecHistory
from nomad_watchdog.controllers.agents.executor import ActionExecutor
from nomad_watchdog.controllers.agents.explain import LoopStatus
from nomad_watchdog.controllers.agents.periodic import PeriodicJobs, every
from nomad_watchdog.controllers.agents.placement_informer import PlacementInformer
from nomad_watchdog.controllers.agents.plan_builder import PlanBuilder
from nomad_watchdog.controllers.agents.record_informer import DOUBT_EVERY_S, RecordInformer
from nomad_watchdog.controllers.agents.workqueue import WorkQueue
from nomad_watchdog.controllers.class_set import ClassSetController, OwnClasses, Place, as_it_is
from nomad_watchdog.controllers.condition_writer import ConditionWriter
from nomad_watchdog.controllers.migration import MigrationController
from nomad_watchdog.controllers.rollout import LOOK_EVERY_S, RolloutController
from nomad_watchdog.core import planner
from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.core.planner import Plan
from nomad_watchdog.core.report_addresses import Reachability
from nomad_watchdog.errors import TransientError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.hosts import HostWatcher
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, DeviceRecord, Monotonic, Presence
from nomad_watchdog.replicas.leases import Leases, SoleOwner
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.replicas.report_addresses import ReportAddresses
from nomad_watchdog.schedulers import Scheduler, Snapshot

log = logging.getLogger(__name__)

NEVER_LOOKED: Final = Monotonic(float("-inf"))
CONFIRM_AFTER_S: Final = 2.0
"""S7: how long after the first read the second one is taken."""
QUICK: Final = 64
"""Up to so many changed records start at once without waiting for a pass: a start needs no breaker."""


ReadSpecs = Callable[[], Awaitable[tuple[dict[str, AgentSpec], dict[str, str]]]]
"""Reads the specs of the configured classes again: those that can be made, and why the others can't."""


class Reconciler:
    """Keeps exactly one agent per present device, for one installation."""

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
        place: Place = as_it_is,
    ) -> None:
        """`unreadable`: agent class → why it has no spec; `read_specs` reads them again. `place`: see
        `in_force.Own`."""
        self.fleet = fleet
        self.leases = leases or SoleOwner()
        self.ownership = ShardOwnership(self.leases)
        self.living = ReportAddresses(self.leases)
        self._prepared_with: tuple[str, ...] = ()
        """The replicas' addresses that the scheduler was last prepared with."""
        self.scheduler = scheduler
        own = OwnClasses(dict(specs), dict(unreadable or {}), place)
        self.in_force = ClassSetController(fleet, self.leases, metrics, own)
        self.rollouts = RolloutController(fleet, specs, self.leases, metrics)
        self.specs = dict(specs)
        """In force; the performer and the upkeep look into the same one."""
        self.metrics = metrics
        self.unreadable = self.in_force.unreadable()
        self.unprepared: dict[str, str] = dict(self.unreadable)
        """Agent class → why it can't be prepared. Its devices keep the agents that they have and get none."""
        self._refused: Mapping[str, str] = {}
        """Of the specs that can be read, those that the scheduler refused last."""
        self._read_specs = read_specs
        self._preparing = asyncio.Lock()
        self._has_prepared = False
        """A shard of ours was prepared for once."""
        self.hashes = {name: spec.spec_hash for name, spec in specs.items()}
        self.queue: WorkQueue[Slug, Action] = WorkQueue(fleet.clock)
        self.executor = ActionExecutor(
            fleet, scheduler, self.specs, self.queue, self._done, self.leases, self.living.told
        )
        self.migrations = MigrationController(
            fleet, scheduler, self.ownership, metrics, self._look_anew
        )
        self.spec_history = SpecHistory(fleet.registry)
        self.plan_builder = PlanBuilder(
            fleet,
            self.ownership,
            self.rollouts,
            self.specs,
            self.hashes,
            self.unprepared,
            metrics,
            self.migrations,
            self.changes,
            no_room=lambda: self._no_room,
            differs=self.in_force.differences,
            reach=self.reach,
        )
        self.breaker = self.plan_builder.breaker
        self.hosts = HostWatcher(fleet)
        self.conditions = ConditionWriter(fleet, self.ownership, self.leases)
        self.last_plan = Plan(())
        self.follower = RecordInformer(fleet, self.ownership, metrics, self._taken, self.migrations)
        self.informer = PlacementInformer(
            scheduler, fleet.clock, fleet.limits.resync_s, metrics, self._take, self._not_seen
        )
        self._wake = asyncio.Event()
        self._observed = False
        self._judge: Callable[[], None] = lambda: None
        """Judge every device, and set the metrics."""
        self._no_room = ""
        self._full: Mapping[str, str] = {}
        self._changed_at: dict[Slug, Monotonic] = {}
        fleet.classes = frozenset(specs) | self.unreadable.keys()
        self._loop_status = self._make_status()
        fleet.attach(self)
        fleet.reports.judged.connect(self.metrics.report)
        fleet.views.add_status(self._loop_status.status)
        fleet.views.add_explain(self._loop_status.explain)

    def _make_status(self) -> LoopStatus:
        return LoopStatus(
            fleet=self.fleet,
            backend=self.scheduler.name,
            hashes=self.hashes,
            queue=self.queue,
            executor=self.executor,
            breaker=self.breaker,
            informer=self.informer,
            leases=self.leases,
            ownership=self.ownership,
            last_plan=lambda: self.last_plan,
            no_room=lambda: self._no_room,
            homes=self.migrations.homes,
            unprepared=self.unprepared,
            changes=self.changes,
            full=lambda: self._full,
            window=lambda action: self.plan_builder.waits(action, self.last_plan),
            reach=self.reach,
            blind=self.migrations.blind,
            stalled=self.plan_builder.stalled,
            patience=self.plan_builder.patience,
        )

    # -- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reconcile until cancelled."""
        self.ownership.prepared = {}
        await self.in_force.start()
        self._follow_classes()
        await self._roll()
        await self._patiently(self._prepare_in_turn, "prepare")
        periodic_jobs = PeriodicJobs(
            fleet=self.fleet,
            scheduler=self.scheduler,
            specs=self.specs,
            prepare=self._prepare_again,
            metrics=self.metrics,
            queue=self.queue,
            executor=self.executor,
            informer=self.informer,
            leases=self.leases,
            ownership=self.ownership,
            wake=self._wake.set,
            doubt=self.follower.doubt_at_once,
            waits_for_room=lambda: bool(
                self._no_room
                or self._full
                or self.last_plan.waiting_rollout
                or self.plan_builder.stalls()
            ),
            stalls=self.plan_builder.stalls,
        )
        self._judge = periodic_jobs.judge
        async with asyncio.TaskGroup() as group:
            group.create_task(self.follower.run())
            group.create_task(self._take_over())
            group.create_task(self.conditions.run())
            group.create_task(self.informer.run())
            group.create_task(self._pass_when_woken())
            for timer in periodic_jobs.timers():
                group.create_task(timer)
            group.create_task(self._remember_specs())
            group.create_task(every(LOOK_EVERY_S, self._roll))
            if self.migrations.on:
                group.create_task(every(LOOK_EVERY_S, self._follow_migration))
            group.create_task(every(DOUBT_EVERY_S, self.follower.doubt))
            group.create_task(self.executor.run())

    async def _patiently(self, call: Callable[[], object], what: str) -> None:
        """Repeat a call that may fail for now; a lasting refusal is raised."""
        delay_s = 0.5
        while True:
            try:
                await call()  # type: ignore[misc]  # a Callable[[], Awaitable] by its only uses
            except TransientError as error:
                log.warning("will try again", extra={"action": what, "reason": str(error)})
                self.fleet.readiness.waits_for = f"{what}: {error}"
                await asyncio.sleep(error.retry_after_s or delay_s)
                delay_s = min(delay_s * 2, 10.0)
            else:
                return

    async def _follow_migration(self) -> None:
        if await self.migrations.poll():
            self._wake.set()

    def _look_anew(self) -> None:
        """More schedulers have agents than those that were looked at: nothing is decided until all were."""
        self.ownership.looked_at = NEVER_LOOKED
        self.informer.resync("migration", now=True)

    async def _roll(self) -> None:
        """Go by the classes and versions that are in force now: the scheduler is prepared for them first."""
        if await self.in_force.look():
            self._follow_classes()
        if await self.rollouts.look():
            self._wake.set()
        if self.plan_builder.behind_rollouts():
            try:
                await self._prepare_in_turn()
            except WatchdogError as error:
                log.warning("prepare failed", extra={"reason": str(error)})

    def _follow_classes(self, *, anew: bool = False) -> None:
        """Go by the class specs that are in force. `anew`: the fleet's limits may have changed, too."""
        specs = self.in_force.specs()
        self.unreadable = self.in_force.unreadable()
        self.fleet.classes = frozenset(specs) | self.unreadable.keys()
        if anew or specs != self.rollouts.configured:
            self.rollouts.want(specs)
            self.executor.end_backoff()
            self._wake.set()

    async def go_by_classes(self, *, bring: bool) -> None:
        """For a command that looks once: go by the class specs that are in force, or would be once a control plane
        started with ours; without preparing the scheduler. `bring`: bring ours into force where they would be.
        Where versions are watched, raises TransientError when it can't be read which were given up."""
        await self.in_force.once(bring=bring)
        self._follow_classes()
        self.prepared(self.rollouts.specs(), self._refused)
        await self.spec_history.read(self.specs)
        if self.rollouts.on:
            await self.rollouts.look()
            if self.rollouts.problem:
                raise TransientError(self.rollouts.problem)
            self.prepared(self.rollouts.specs(), self._refused)

    async def configure(
        self,
        specs: Mapping[str, AgentSpec],
        *,
        read_specs: ReadSpecs | None = None,
        unreadable: Mapping[str, str] | None = None,
        place: Place = as_it_is,
    ) -> None:
        """Be configured with these specs from now on, without a restart; as in the constructor. What is in force
        then is decided as at a start (`core.config_precedence`).

        A class that the scheduler refuses waits with that reason, and a scheduler that does not answer now is
        prepared later. Raises UserError or TerminalError when it refuses to be prepared at all, and then
        nothing has changed."""
        own = OwnClasses(dict(specs), dict(unreadable or {}), place)
        async with self._preparing:
            refused: Mapping[str, str] | None = None
            wanted: Mapping[str, AgentSpec] | None = None
            try:
                wanted = await self.in_force.would_be(own)
                if wanted is not None:
                    refused = await self._have_prepared(wanted)
            except TransientError as error:
                log.warning("prepare failed", extra={"reason": str(error)})
            except WatchdogError:
                with suppress(WatchdogError):  # it is prepared again by and by
                    await self._have_prepared(self.specs)
                raise
            self._read_specs = read_specs
            await self.in_force.go_by(own)
            self._follow_classes(anew=True)
            await self.spec_history.read(self.in_force.specs().keys() - self.specs.keys())
            await self.rollouts.look()
            in_force = self.rollouts.specs()
            if refused is not None and in_force == wanted:
                self.prepared(in_force, refused)
            else:  # it was prepared for more than is in force, or not at all
                try:
                    await self._prepare()
                except WatchdogError as error:
                    log.warning("prepare failed", extra={"reason": str(error)})
        self.executor.end_backoff()
        self._wake.set()

    def reach(self) -> Reachability:
        """The replicas that are there, and the agents that are not heard."""
        return Reachability(self.living.vouched() or frozenset(), self.fleet.verdicts.silent)

    def changes(self, agent_class: str, spec_hash: str) -> str:
        """What the spec of a class that is in force changes for an agent of this hash, in words."""
        return self.spec_history.change(
            agent_class, spec_hash, self.rollouts.specs().get(agent_class)
        )

    async def _remember_specs(self) -> None:
        await self.spec_history.read(self.specs)
        while True:
            await self.spec_history.remember(list(self.specs.values()))
            await asyncio.sleep(self.fleet.limits.resync_s)

    async def _prepare(self) -> None:
        """Have the scheduler prepared for the versions in force. One call at a time: the last counts."""
        specs = dict(self.rollouts.specs())
        self.prepared(specs, await self._have_prepared(specs))

    async def _have_prepared(self, specs: Mapping[str, AgentSpec]) -> Mapping[str, str]:
        """Have the scheduler prepared for these specs, with the replicas' addresses of this moment, on the
        shards that are ours now. As `Scheduler.prepare`."""
        terms, addresses = dict(self.leases.terms()), self.living.addresses()
        told = [self.living.told(spec) for spec in specs.values()]
        refused = await self.scheduler.prepare(told, shards=terms.keys()) or {}
        self.ownership.prepare(terms)
        self._prepared_with = addresses
        self._has_prepared = self._has_prepared or bool(terms)
        return refused

    async def _prepare_in_turn(self) -> None:
        async with self._preparing:
            await self._prepare()

    async def _prepare_again(self) -> None:
        """Also for the classes that could not be prepared before."""
        async with self._preparing:
            if self.unreadable and self._read_specs is not None:
                found, still = await self._read_specs()
                if await self.in_force.have_read(found, still):
                    self._follow_classes()
                    await self.spec_history.read(self.in_force.specs())
                self.unreadable = self.in_force.unreadable()
            await self._prepare()

    def prepared(self, specs: Mapping[str, AgentSpec], refused: Mapping[str, str]) -> None:
        """The scheduler was prepared for these specs but for the classes in `refused` (class → why): nothing is
        started or replaced for those, and what runs is left alone."""
        hashes = {name: spec.spec_hash for name, spec in specs.items() if name not in refused}
        # In place: others look into the same dictionaries.
        for known, now in ((self.specs, dict(specs)), (self.hashes, hashes)):
            known.clear()
            known.update(now)  # type: ignore[arg-type]  # each gets its own
        self._refused = dict(refused)
        self._wake.set()
        before = dict(self.unprepared)
        self.unprepared.clear()
        self.unprepared.update({**self.unreadable, **refused})
        for name in sorted(before.keys() | self.unprepared.keys()):
            why = self.unprepared.get(name, "")
            if why != before.get(name, ""):
                self._say_prepared(name, why)

    def _say_prepared(self, name: str, why: str) -> None:
        if why:
            log.warning("agent class not prepared", extra={"agent_class": name, "reason": why})
        text = (
            f"agent class {name} can't be prepared: {why}"
            if why
            else f"agent class {name} is prepared"
        )
        self.fleet.events.own.add(
            at=self.fleet.clock.wall(),
            kind="class.unprepared" if why else "class.prepared",
            device_id="",
            slug=Slug(""),
            text=text,
            data={"class": name},
        )

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
            ours = self.ownership.shards()
            for record in records:
                if self.ownership.shard(record.slug) in ours:
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
        """Whether this instance is heard of for the first time beside the accepted one: then the device is
        listed anew before one of them is refused (S8)."""
        first = self.informer.freshness.rivals(slug, instance)
        if first:
            self.informer.look_again({slug})
        return first

    async def _take_over(self) -> None:
        """For each shard that becomes ours, have the scheduler prepared and look at both stores anew: its last
        holder may have acted after what we know (S8), and what it prepared may name the replica that is gone.
        So may what we prepared when another replica goes."""
        while True:
            await self.leases.changed.wait()
            self.leases.changed.clear()
            living = self.living.vouched()
            gone = living is not None and not living.issuperset(self._prepared_with)
            if self.ownership.unprepared() or (gone and self.leases.terms()):
                await self._prepare_taken()
            if self.ownership.unseen():
                self.informer.resync("lease", now=True)
                try:
                    await self.follower.read()
                except WatchdogError:
                    self.follower.doubt_at_once()
                    await asyncio.sleep(0.2)
                    self.leases.changed.set()
            self._wake.set()

    async def _prepare_taken(self) -> None:
        terms = dict(self.leases.terms())
        try:
            await self._prepare_in_turn()
        except TransientError as error:
            log.warning("prepare failed", extra={"reason": str(error)})
            await asyncio.sleep(error.retry_after_s or random.uniform(0.2, 1.0))  # noqa: S311  # jitter
            self.leases.changed.set()
        except WatchdogError as error:
            if not self._has_prepared:
                raise
            # Refused for good. Agents can still be stopped, and started from what is there.
            log.warning("prepare failed", extra={"reason": str(error)})
            self.ownership.prepare(terms)
        else:
            self.executor.end_backoff()

    def _taken(self, news: bool) -> None:
        if news:
            self._wake.set()
        self._say_if_ready()

    def _say_if_ready(self) -> None:
        if self.follower.has_read and self._observed:
            if not self.fleet.readiness.event.is_set():
                # A scrape right after a restart must not see 0 devices offline: alerts would resolve.
                self._judge()
            self.fleet.readiness.event.set()
            self.fleet.readiness.waits_for = ""

    def _not_seen(self, reason: str) -> None:
        if not self._observed:
            self.fleet.readiness.waits_for = reason

    def _take(self, snapshot: Snapshot) -> None:
        fleet = self.fleet
        fleet.apply_placements(snapshot.placements, snapshot.only)
        if snapshot.only is None:
            self._observed = True
            self.ownership.looked_at = self.informer.began_at
            self.hosts.seen(snapshot.closed_hosts)
        self.plan_builder.waiting.seen(snapshot.placements, snapshot.only, fleet.clock.monotonic())
        self.executor.remember_stops(self.informer.read_began_at)
        seen = snapshot.only if snapshot.only is not None else list(self.executor.expectations)
        for slug in seen:
            if slug in snapshot.behind:
                continue
            expected = self.executor.expectations.get(slug)
            if expected is not None and snapshot.index >= expected.index:
                # Shown, or a phantom: either way the planner may decide again.
                del self.executor.expectations[slug]
        self._say_if_ready()
        self._wake.set()

    # -- plan -----------------------------------------------------------------------------------

    def _undecided(self, slug: Slug) -> bool:
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
                await self._read_again()
            starts = any(a.kind is ActionKind.START or a.stalled for a in self.last_plan.actions)
            if starts or self._no_room or self._full:
                await self._ask_for_room()
            # A pass may cost about a twentieth of the time: while it thinks, no answer is read.
            await asyncio.sleep(min(19 * took_s, 2.0))

    def reconcile(self) -> Plan:
        """One pass: decide for every device and hand the actions to the queue. No I/O."""
        plan = self.plan_builder.make(self.breaker.confirmed)
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
        for action in set(plan.refused) - set(self.last_plan.refused):
            log.error("unsafe start refused", extra={"slug": action.slug, "epoch": action.epoch})
            self.metrics.unsafe_start()
        self.plan_builder.hold(plan)
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
        self.plan_builder.hold(self.plan_builder.make(self.breaker.confirmed))

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
        if outcome == "ok" and action.stalled:
            self.plan_builder.waiting.given_up(action.slug, self.fleet.clock.monotonic())
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
