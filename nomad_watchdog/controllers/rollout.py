"""Roll-outs: which specs each class has now, and back to the proven one when the new one is bad.

The registry stores one small document per class (`rollout_state`). Every replica applies it and observes the agents of
new versions; only the leader judges and writes. A class without steps gets a new spec at once, window by window
(`core.rollout_soak`); with steps, only the devices that have their turn (`staged_rollout`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import Final

from nomad_watchdog.controllers.rollout_judge import RolloutJudge
from nomad_watchdog.controllers.rollout_soaks import VersionSoaks
from nomad_watchdog.controllers.rollout_state import (
    RolloutState,
    document_format,
    restored,
)
from nomad_watchdog.controllers.staged_rollout import ReadQuery, StagedRollout, publish
from nomad_watchdog.core import rollout_progress
from nomad_watchdog.core.actions import Action, ActionOutcome, Move
from nomad_watchdog.core.rollout_progress import RolloutProgress
from nomad_watchdog.core.rollout_soak import Soak, SoakLimits
from nomad_watchdog.core.rollout_steps import AT_ONCE, Strategy
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, DeviceRecord, Monotonic
from nomad_watchdog.registry.document import Document
from nomad_watchdog.replicas.leases import Leases
from nomad_watchdog.replicas.ownership import is_leader

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
READ_EVERY_S: Final = 5.0
"""Maximum time until another replica applies what the leader wrote; during a roll-out in steps, POLL_S."""


class RolloutController:
    """The specs in force. `configured`: as in the configuration; `strategies`: by class, others roll out at once."""

    def __init__(
        self,
        fleet: Fleet,
        configured: Mapping[str, AgentSpec],
        leases: Leases,
        metrics: Metrics,
        strategies: Mapping[str, Strategy] | None = None,
    ) -> None:
        self._fleet = fleet
        self._configured = dict(configured)
        self._strategies = dict(strategies or {})
        self._leases = leases
        self._metrics = metrics
        self._limits = SoakLimits(fleet.limits.soak_s, fleet.limits.soak_deaths)
        self._documents: dict[str, Document[RolloutState]] = {}
        self._soaks = VersionSoaks(fleet)
        self._judge = RolloutJudge(fleet, self)
        self._staged: dict[str, StagedRollout] = {}
        self._completed: dict[str, str] = {}
        """Class → hash of the proven spec whose document was seen to be complete."""
        self._read_at = float("-inf")
        self._heard_from = fleet.clock.monotonic() + fleet.limits.report_stale_s
        self._polled_at: Monotonic | None = None
        self._in_force_now = dict(configured)
        self._halted = frozenset(self._configured) if self.on else frozenset()
        """All classes until the documents have been read: until then it is not known which versions were given up."""
        self._reading: set[str] = set()
        """Classes whose query is being read."""
        self.problem = ""
        """Why the documents can't be read now; what was read before stays in force."""

    @property
    def on(self) -> bool:
        """Whether new versions have to prove themselves."""
        return self._limits.soak_s > 0 or any(map(self._has_steps, self._configured))

    def _has_steps(self, name: str) -> bool:
        return bool(self.strategy(name).steps)

    def strategy(self, name: str) -> Strategy:
        """How the versions of a class are rolled out."""
        return self._strategies.get(name, AT_ONCE)

    def specs(self) -> dict[str, AgentSpec]:
        """Agent class → the spec in force. During a roll-out in steps, the proven one."""
        return self._in_force_now

    def trial_specs(self) -> dict[str, AgentSpec]:
        """Agent class → the spec that is rolled out in steps."""
        return {
            name: one.spec
            for name, one in self._staged.items()
            if one.spec is not self._in_force_now.get(name) and not self.is_given_up(name)
        }

    def trials(self, prepared: Collection[str]) -> Mapping[Slug, str]:
        """Devices that have had their turn → hash of the spec that they should have. `prepared`: hashes of the specs on
        trial that the scheduler is prepared for; agents of a spec that was given up and is kept start no more."""
        found: Mapping[Slug, str] = {}
        for name, one in self._staged.items():
            if one.trials and (one.spec.spec_hash in prepared or self.is_given_up(name)):
                found = {**found, **one.trials} if found else one.trials
        return found

    def given_up(self) -> frozenset[str]:
        """Hashes of the configured specs that were given up."""
        return frozenset(
            spec.spec_hash for name, spec in self._configured.items() if self.is_given_up(name)
        )

    def spec_for(self, record: DeviceRecord, move: Move | None = None) -> AgentSpec | None:
        """The spec with which an agent of this device is started now, or replaced in place for this reason; None = its
        class is not configured."""
        name = record.device.agent_class
        staged = self._staged.get(name)
        if staged is not None and staged.starts_with_it(record.slug, move):
            return staged.spec
        return self._in_force_now.get(name)

    def action_ended(self, action: Action, outcome: ActionOutcome, _took_s: float) -> None:
        """An action has ended."""
        record = self._fleet.records.get(action.slug)
        staged = self._staged.get(record.device.agent_class) if record is not None else None
        if staged is not None:
            staged.action_ended(action, outcome)

    def refuse(self, refused: Mapping[str, str]) -> None:
        """What the scheduler said of the specs on trial: hash → why it can't be prepared for it."""
        for one in self._staged.values():
            one.refused = refused.get(one.spec.spec_hash, "")

    @property
    def configured(self) -> Mapping[str, AgentSpec]:
        """Agent class → its configured spec."""
        return self._configured

    def configured_hashes(self) -> dict[str, str]:
        """Agent class → the hash of its configured spec."""
        return {name: spec.spec_hash for name, spec in self._configured.items()}

    def configure(
        self, configured: Mapping[str, AgentSpec], strategies: Mapping[str, Strategy] | None = None
    ) -> None:
        """Apply these configured specs, these strategies (None: as before) and the current limits of the fleet. Where
        new versions have to prove themselves, a class that is new or changed waits until it is known which versions
        were given up."""
        changed = {n for n, spec in configured.items() if self._configured.get(n) != spec}
        self._configured = dict(configured)
        self._strategies = dict(self._strategies if strategies is None else strategies)
        self._limits = SoakLimits(self._fleet.limits.soak_s, self._fleet.limits.soak_deaths)
        kept = configured.keys() - changed
        self._soaks.keep(kept)
        before = self._staged.keys()
        self._staged = {
            n: s for n, s in self._staged.items() if n in kept and s.strategy == self.strategy(n)
        }
        self._read_at = float("-inf")
        if self.on:
            self._in_force_now = {
                n: self._in_force_now.get(n, spec) for n, spec in configured.items()
            }
            self._halted |= changed | ((before - self._staged.keys()) & configured.keys())
        else:
            self._in_force_now, self._halted = dict(configured), frozenset()
        publish(self._fleet.trials, self._staged)

    def halted(self) -> frozenset[str]:
        """Classes in which nothing is replaced: nothing is known of their roll-out yet, their new version was given up
        and is kept, or there is no earlier one to go back to."""
        return self._halted | {name for name, one in self._staged.items() if not one.is_known}

    async def apply(self) -> None:
        """Apply what was read or stored."""
        self._in_force_now = {
            name: await self._in_force(name, spec) for name, spec in self._configured.items()
        }
        self._halted = frozenset(
            name for name, spec in self._configured.items() if self._is_stuck(name, spec)
        )
        for name, spec in self._configured.items():
            self._follow(name, spec)
        publish(self._fleet.trials, self._staged)
        given_up = sum(map(self.is_given_up, self._configured))
        going = sum(not self.is_given_up(name) for name in self._staged)
        self._metrics.rollouts.classes(given_up=given_up, in_progress=going)

    async def _in_force(self, name: str, configured: AgentSpec) -> AgentSpec:
        if not (self.is_given_up(name) or self._needs_steps(name)):
            return configured
        return await asyncio.to_thread(restored, self.state(name), configured) or configured

    def _needs_steps(self, name: str) -> bool:
        """Whether the configured spec of a class has to be rolled out in steps."""
        good = self.state(name).good
        is_new = good is not None and good.spec_hash != self._configured[name].spec_hash
        return is_new and self._has_steps(name)

    def _is_stuck(self, name: str, spec: AgentSpec) -> bool:
        """Whether nothing may be replaced: agents of a version that was given up keep it, or the version before is
        needed and its template is not known any more."""
        if self.is_given_up(name) and self.state(name).keeps:
            return True
        needed = self.is_given_up(name) or self._needs_steps(name)
        return needed and self._in_force_now[name] is spec

    def _is_staged(self, name: str) -> bool:
        """Whether a spec of the class is rolled out in steps: there is a proven one that the others keep."""
        configured = self._configured[name]
        return self._has_steps(name) and self._in_force_now[name] is not configured

    def _follow(self, name: str, spec: AgentSpec) -> None:
        """Apply the progress of a roll-out in steps. It begins at the first step before that is stored."""
        if not self._is_staged(name):
            self._staged.pop(name, None)
            return
        staged = self._staged.get(name)
        if staged is None or staged.spec != spec:
            staged = self._staged[name] = StagedRollout(
                self._fleet, spec, self.strategy(name), heard_from=Monotonic(self._heard_from)
            )
        if self.is_given_up(name):
            staged.give_up(keep=self.state(name).keeps)
        else:
            staged.follow(self.progress(name))

    def progress(self, name: str) -> RolloutProgress:
        """How far the configured spec of a class has come in its roll-out in steps."""
        spec, strategy, state = self._configured[name], self.strategy(name), self.state(name)
        is_upgrade = state.good is not None and state.good.version != spec.version
        return rollout_progress.of_spec(
            state.progress,
            spec.spec_hash,
            spec.version,
            len(strategy.steps),
            self._fleet.clock.wall(),
            defers=strategy.defers_upgrades and is_upgrade,
        )

    def state(self, name: str) -> RolloutState:
        """What the registry stores of a class, as last read."""
        return self.document(name).value

    def document(self, name: str) -> Document[RolloutState]:
        """The document of a class."""
        if name not in self._documents:
            self._documents[name] = Document(self._fleet.registry, document_format(name))
        return self._documents[name]

    def staged(self, name: str) -> StagedRollout | None:
        """The roll-out in steps of a class; None = there is none."""
        return self._staged.get(name)

    def soaking(self) -> int:
        """As `VersionSoaks.soaking`."""
        return self._soaks.soaking(self._configured)

    def soak(self, name: str) -> Soak | None:
        """The agents of a version that is rolled out without steps; None = there is none."""
        return self._soaks.of(name)

    def is_given_up(self, name: str) -> bool:
        """Whether the configured spec of a class was given up."""
        return self.state(name).bad == self._configured[name].spec_hash

    # -- the documents in the registry ----------------------------------------------------------------

    async def poll(self) -> bool:
        """Read the documents, observe the agents of new versions and, as the leader, judge them; whether there may be
        more room in the roll-out window. Errors of the registry are reported in `problem`."""
        if not self.on:
            return False
        before = self._room()
        try:
            now = self._fleet.clock.monotonic()
            if now - self._read_at >= (POLL_S if self._staged else READ_EVERY_S):
                await self.read()
                self._read_at = now
            if self._fleet.readiness.ready:
                for name, spec in self._configured.items():
                    await self._watch(name, spec)
                publish(self._fleet.trials, self._staged)
            self._polled_at = now
        except WatchdogError as error:
            self._polled_at = None
            for staged in self._staged.values():
                staged.interrupted()
            if not self.problem:
                log.warning("roll-outs not judged", extra={"reason": str(error)})
            self.problem = str(error)
        else:
            self.problem = ""
        return before != self._room()

    def _room(self) -> tuple[object, ...]:
        """Changes when there is room for more replacements."""
        return (
            self._halted,
            self._soaks.lasted(),
            {name: frozenset(one.trials) for name, one in self._staged.items()},
            self._in_force_now,
        )

    def analyse(self, read: ReadQuery, group: asyncio.TaskGroup) -> None:
        """As the leader, read the queries that are due, each in a task of its own: one that takes long delays no other.
        `read` raises nothing."""
        if is_leader(self._leases):
            for name in self._staged.keys() - self._reading:
                self._reading.add(name)
                group.create_task(self._analyse(name, read))

    async def _analyse(self, name: str, read: ReadQuery) -> None:
        try:
            if name in self._staged:
                await self._staged[name].analyse(read)
        finally:
            self._reading.discard(name)

    async def read(self) -> None:
        """Read the documents and apply them. Raises what the registry raises."""
        if any([await self.document(n).refresh() for n in self._configured]) or self._read_at < 0:
            await self.apply()

    async def write(self, name: str, state: RolloutState) -> bool:
        """As `rollout_judge.RolloutBook`."""
        if not await self.document(name).replace(state):
            self._read_at = float("-inf")  # another leader was faster: read what it wrote
            return False
        await self.apply()
        return True

    # -- watching and judging -------------------------------------------------------------------

    async def _watch(self, name: str, spec: AgentSpec) -> None:
        state = self.state(name)
        settled = state.good is not None and state.good.spec_hash == spec.spec_hash
        if settled or self.is_given_up(name):
            self._soaks.end(name)
            if self.is_given_up(name):
                self._follow(name, spec)
            elif is_leader(self._leases) and self._completed.get(name) != spec.spec_hash:
                whole = await asyncio.to_thread(state.completed, spec)
                if whole == state or await self.write(name, whole):
                    self._completed[name] = spec.spec_hash
            return
        self._completed.pop(name, None)
        if self._is_staged(name):
            await self._watch_steps(name, spec)
            return
        soak, wanted = self._soaks.look(spec, self._limits)
        if is_leader(self._leases):
            await self._judge.judge(spec, soak, wanted)

    async def _watch_steps(self, name: str, spec: AgentSpec) -> None:
        if name not in self._staged:
            return  # its proven version is not known any more
        self._follow(name, spec)
        staged, progress = self._staged[name], self.progress(name)
        were_ready = rollout_progress.is_ready(staged.strategy, staged.observed)
        staged.observe()
        if not is_leader(self._leases):
            staged.soaked_s = progress.soaked_s
            staged.follows()
            return
        stored = self.state(name).progress
        if stored is not None and stored.spec == progress.spec:
            now, last = self._fleet.clock.monotonic(), self._polled_at
            lasted_s = now - last if were_ready and last is not None else 0.0
            await self._judge.judge_steps(name, staged, progress, lasted_s)
        elif not staged.unheard() or self._fleet.clock.monotonic() > self._heard_from:
            await self._judge.begin(name, spec, progress)
