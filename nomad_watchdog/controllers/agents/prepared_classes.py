"""The class specs that agents are started with: in force, and the scheduler has been prepared for them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from nomad_watchdog.config.spec_history import SpecHistory
from nomad_watchdog.controllers.class_set import ClassSetController, OwnClasses, Place, unchanged
from nomad_watchdog.controllers.rollout import RolloutController
from nomad_watchdog.core.actions import Move
from nomad_watchdog.core.rollout_steps import Strategy
from nomad_watchdog.errors import TransientError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, DeviceRecord
from nomad_watchdog.replicas.leases import Leases
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.replicas.report_addresses import ReportAddresses
from nomad_watchdog.schedulers import Scheduler
from nomad_watchdog.signals import Signal

log = logging.getLogger(__name__)

ReadSpecs = Callable[[], Awaitable[tuple[dict[str, AgentSpec], dict[str, str]]]]
"""Reads the specs of the configured classes again: those that can be made, and why the others can't."""


class PreparedClasses:
    """The agent classes of one reconciler."""

    def __init__(  # noqa: PLR0913  # as the Reconciler, which makes it
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        specs: Mapping[str, AgentSpec],
        metrics: Metrics,
        leases: Leases,
        ownership: ShardOwnership,
        *,
        read_specs: ReadSpecs | None = None,
        unreadable: Mapping[str, str] | None = None,
        place: Place = unchanged,
        strategies: Mapping[str, Strategy] | None = None,
    ) -> None:
        """`unreadable`: agent class → why it has no spec; `read_specs` reads them again. `place`: as of
        `class_set.OwnClasses`. `strategies`: as of `RolloutController`."""
        self._fleet = fleet
        self._scheduler = scheduler
        self._leases = leases
        self._ownership = ownership
        self.addresses = ReportAddresses(leases)
        self.in_force = ClassSetController(
            fleet, leases, metrics, OwnClasses(dict(specs), dict(unreadable or {}), place)
        )
        self.rollouts = RolloutController(fleet, specs, leases, metrics, strategies)
        self.history = SpecHistory(fleet.registry)
        # Other components hold these dictionaries: they are changed in place.
        self.specs = dict(specs)
        """By class: the specs that the scheduler was last asked to be prepared for."""
        self.hashes = {name: spec.spec_hash for name, spec in specs.items()}
        """By class: the hashes of the specs that the scheduler is prepared for."""
        self._trials_asked: frozenset[str] = frozenset()
        """Hashes of the specs on trial that the scheduler was last asked to be prepared for."""
        self._trials_prepared: frozenset[str] = frozenset()
        """Those of them that it is prepared for."""
        self.unprepared: dict[str, str] = dict(self.in_force.unreadable())
        """Agent class → why the scheduler can't be prepared for it. Its devices keep their agents and get none."""
        self.changed: Signal[[]] = Signal()
        """Another spec is in force, or the scheduler is prepared for one."""
        self.repaired: Signal[[]] = Signal()
        """What failed because the scheduler was not prepared may succeed now."""
        self._unreadable = self.in_force.unreadable()
        self._refused: Mapping[str, str] = {}
        """Readable specs that the scheduler refused last."""
        self._read_specs = read_specs
        self._lock = asyncio.Lock()
        self._prepared_with: tuple[str, ...] = ()
        """The replicas' addresses that the scheduler was last prepared with."""
        self._has_prepared = False
        """The scheduler was prepared for a shard of ours at least once."""
        fleet.classes = frozenset(specs) | self._unreadable.keys()

    # -- the specs in force ---------------------------------------------------------------------

    async def start(self) -> None:
        """Read what is in force, as a control plane that starts. Raises TransientError when it is unknown which versions
        are proven: until then no agent may start."""
        self._ownership.prepared = {}
        await self.in_force.start()
        self._follow()
        await self.poll()
        if self.rollouts.problem:
            raise TransientError(self.rollouts.problem)

    async def poll(self) -> bool:
        """Follow the class set and the roll-outs in the registry, and prepare the scheduler for other specs; whether
        a roll-out has changed."""
        if await self.in_force.poll():
            self._follow()
        changed = await self.rollouts.poll()
        if self.behind():
            try:
                await self.prepare()
            except WatchdogError as error:
                log.warning("prepare failed", extra={"reason": str(error)})
        return changed

    def behind(self) -> frozenset[str]:
        """Classes with another spec in force than the scheduler was asked to be prepared for, and classes that are no
        longer configured. A spec that the scheduler refused is not among them."""
        specs, asked = self.rollouts.specs(), self.specs
        new = {n for n, s in specs.items() if n not in asked or asked[n].spec_hash != s.spec_hash}
        trials = {
            name
            for name, spec in self.rollouts.trial_specs().items()
            if spec.spec_hash not in self._trials_asked
        }
        return frozenset(new | (asked.keys() - specs.keys()) | trials)

    def _follow(
        self, *, anew: bool = False, strategies: Mapping[str, Strategy] | None = None
    ) -> None:
        """Apply the specs that are in force. `anew`: the fleet's limits may have changed, too."""
        specs = self.in_force.specs()
        self._unreadable = self.in_force.unreadable()
        self._fleet.classes = frozenset(specs) | self._unreadable.keys()
        if anew or specs != self.rollouts.configured:
            self.rollouts.configure(specs, strategies)
            self.repaired.emit()
            self.changed.emit()

    async def read_once(self, *, bring: bool) -> None:
        """For a command that decides once: apply the specs that are in force, or would be once a control plane
        started with ours, without preparing the scheduler. `bring`: bring ours into force where they would be.
        Raises TransientError when it is unknown which versions were given up."""
        await self.in_force.read_once(apply=bring)
        self._follow()
        self.prepared(self.rollouts.specs(), self._refused)
        await self.history.read(self.specs)
        if self.rollouts.on:
            await self.rollouts.poll()
            if self.rollouts.problem:
                raise TransientError(self.rollouts.problem)
            self.prepared(self.rollouts.specs(), self._refused)

    async def configure(
        self,
        specs: Mapping[str, AgentSpec],
        *,
        read_specs: ReadSpecs | None = None,
        unreadable: Mapping[str, str] | None = None,
        place: Place = unchanged,
        strategies: Mapping[str, Strategy] | None = None,
    ) -> None:
        """Be configured with these specs from now on, without a restart; as in the constructor. What is in force
        then is decided as at a start (`core.config_precedence`).

        A class that the scheduler refuses waits with that reason, and a scheduler that does not answer is prepared
        later. Raises UserError or TerminalError if it refuses to be prepared at all; then nothing has changed."""
        own = OwnClasses(dict(specs), dict(unreadable or {}), place)
        async with self._lock:
            refused: Mapping[str, str] | None = None
            wanted: Mapping[str, AgentSpec] | None = None
            try:
                wanted = await self.in_force.preview(own)
                if wanted is not None:
                    refused = await self._prepare_for(*self._tried(wanted, strategies or {}))
            except TransientError as error:
                log.warning("prepare failed", extra={"reason": str(error)})
            except WatchdogError:
                with suppress(WatchdogError):  # the next periodic preparation tries again
                    await self._prepare_for(self.specs)
                raise
            self._read_specs = read_specs
            await self.in_force.configure(own)
            self._follow(anew=True, strategies=strategies)
            await self.history.read(self.in_force.specs().keys() - self.specs.keys())
            await self.rollouts.poll()
            in_force = self.rollouts.specs()
            if refused is not None and in_force == wanted:
                self.prepared(in_force, refused)
            else:  # the scheduler was prepared for more than is in force, or not at all
                try:
                    await self._prepare()
                except WatchdogError as error:
                    log.warning("prepare failed", extra={"reason": str(error)})
        self.repaired.emit()
        self.changed.emit()

    def changes(self, agent_class: str, spec_hash: str) -> str:
        """What the spec that is in force or on trial changes for an agent of this class and hash, in words."""
        specs = self.rollouts.specs() | self.rollouts.trial_specs()
        return self.history.change(agent_class, spec_hash, specs.get(agent_class))

    def trials(self) -> Mapping[Slug, str]:
        """Devices that have had their turn in a roll-out → hash of its spec, where the scheduler is prepared for it."""
        return self.rollouts.trials(self._trials_prepared)

    def spec_for(self, record: DeviceRecord, move: Move | None = None) -> AgentSpec | None:
        """The spec with which an agent of this device is started now: one that the scheduler was asked to be prepared
        for. `move`: why it is replaced in place, None = it is started. None = its class is not configured."""
        found = self.rollouts.spec_for(record, move)
        if found is not None and found.spec_hash in self._trials_prepared:
            return found
        return self.specs.get(record.device.agent_class)

    async def remember(self) -> None:
        """Store the specs in force from time to time, until cancelled, so that later changes can be described."""
        await self.history.read(self.specs)
        while True:
            trials = self.rollouts.trial_specs().values()
            await self.history.remember([*self.specs.values(), *trials])
            await asyncio.sleep(self._fleet.limits.resync_s)

    # -- the scheduler --------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Have the scheduler prepared for the specs in force, after any preparation in progress."""
        async with self._lock:
            await self._prepare()

    async def prepare_again(self) -> None:
        """As `prepare`, also for classes that could not be read before."""
        async with self._lock:
            if self._unreadable and self._read_specs is not None:
                found, still = await self._read_specs()
                if await self.in_force.on_files_read(found, still):
                    self._follow()
                    await self.history.read(self.in_force.specs())
                self._unreadable = self.in_force.unreadable()
            await self._prepare()

    def is_due(self) -> bool:
        """Whether the scheduler must be prepared now: for a shard that has become ours, whose last holder may have
        prepared it with addresses that are gone, or because a replica that we named is gone."""
        alive = self.addresses.complete()
        gone = alive is not None and not alive.issuperset(self._prepared_with)
        return self._ownership.unprepared() or (gone and bool(self._leases.terms()))

    async def prepare_taken(self) -> bool:
        """Prepare the scheduler for shards that have become ours; False = try again, after a pause that has passed.
        Raises what the scheduler raises when it refuses for good and was never prepared."""
        terms = dict(self._leases.terms())
        try:
            await self.prepare()
        except TransientError as error:
            log.warning("prepare failed", extra={"reason": str(error)})
            await asyncio.sleep(error.retry_after_s or random.uniform(0.2, 1.0))  # noqa: S311  # jitter
            return False
        except WatchdogError as error:
            if not self._has_prepared:
                raise
            # Agents can still be stopped, and started from what is there.
            log.warning("prepare failed", extra={"reason": str(error)})
            self._ownership.prepare(terms)
        else:
            self.repaired.emit()
        return True

    async def _prepare(self) -> None:
        specs = dict(self.rollouts.specs())
        self.prepared(specs, await self._prepare_for(specs))

    def _tried(
        self, wanted: Mapping[str, AgentSpec], strategies: Mapping[str, Strategy]
    ) -> tuple[dict[str, AgentSpec], dict[str, AgentSpec]]:
        """The specs that agents start with when a configuration is applied, and those that are on trial then: a new
        spec of a class with steps must not take the place of the one before."""
        staged = {
            name: spec
            for name, spec in wanted.items()
            if (one := strategies.get(name)) is not None
            and one.steps
            and name in self.specs
            and self.specs[name].spec_hash != spec.spec_hash
        }
        return {**wanted, **{name: self.specs[name] for name in staged}}, staged

    async def _prepare_for(
        self, specs: Mapping[str, AgentSpec], on_trial: Mapping[str, AgentSpec] | None = None
    ) -> Mapping[str, str]:
        """Have the scheduler prepared for these specs, with the replicas' current addresses, on the shards that are
        ours. As `Scheduler.prepare`. `on_trial`: None = those of the roll-outs in steps."""
        terms, addresses = dict(self._leases.terms()), self.addresses.addresses()
        addressed = [self.addresses.adapt(spec) for spec in specs.values()]
        tried = self.rollouts.trial_specs() if on_trial is None else on_trial
        trials = [self.addresses.adapt(spec) for spec in tried.values()]
        more = {"trials": trials} if trials else {}
        refused = await self._scheduler.prepare(addressed, shards=terms.keys(), **more) or {}
        self._trials_asked = frozenset(spec.spec_hash for spec in trials)
        self._trials_prepared = self._trials_asked - refused.keys()
        self.rollouts.refuse(refused)
        self._ownership.prepare(terms)
        self._prepared_with = addresses
        self._has_prepared = self._has_prepared or bool(terms)
        return refused

    def prepared(self, specs: Mapping[str, AgentSpec], refused: Mapping[str, str]) -> None:
        """The scheduler was prepared for these specs except for the classes in `refused` (class → reason). No agent
        of those is started or replaced, and running ones continue."""
        hashes = {name: spec.spec_hash for name, spec in specs.items() if name not in refused}
        specs = dict(specs)
        self.specs.clear()
        self.specs.update(specs)
        self.hashes.clear()
        self.hashes.update(hashes)
        self._refused = dict(refused)
        self.changed.emit()
        before = dict(self.unprepared)
        self.unprepared.clear()
        self.unprepared.update({**self._unreadable, **refused})
        for name in sorted(before.keys() | self.unprepared.keys()):
            reason = self.unprepared.get(name, "")
            if reason != before.get(name, ""):
                self._publish(name, reason)

    def _publish(self, name: str, reason: str) -> None:
        if reason:
            log.warning("agent class not prepared", extra={"agent_class": name, "reason": reason})
            text = f"agent class {name} can't be prepared: {reason}"
        else:
            text = f"agent class {name} is prepared"
        kind = "class.unprepared" if reason else "class.prepared"
        self._fleet.events.note_fleet(kind, text, {"class": name})
