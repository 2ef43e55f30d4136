"""One class's roll-out in steps, as one replica sees it: whose turn it is, and what became of the devices tried."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Final

from nomad_watchdog.controllers.rollout_state import MAX_UNWELL
from nomad_watchdog.core import rollout_progress, rollout_steps
from nomad_watchdog.core.actions import Action, ActionKind, ActionOutcome, Move
from nomad_watchdog.core.allowed_times import allowed
from nomad_watchdog.core.rollout_analysis import Analysis, Measured, QueryValue, after, why_bad
from nomad_watchdog.core.rollout_progress import Observed, RolloutProgress
from nomad_watchdog.core.rollout_soak import ObservedRun, Soak, SoakLimits
from nomad_watchdog.core.rollout_steps import Member, RolloutTurns, Strategy
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.trials import SUSPENDED, TrialDevices
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    AgentSpec,
    Monotonic,
    PlacementState,
    Presence,
    VerdictState,
)

_UP: Final = (PlacementState.RUNNING, PlacementState.LOST)
_ENDS: Final = (PlacementState.STOPPING, PlacementState.DEAD)
ReadQuery = Callable[[Analysis], Awaitable[QueryValue]]
_NO_LIMIT: Final = SoakLimits(soak_s=float("inf"))
"""An agent on trial that was ready and ends before its step has passed has ended too soon."""


READ_BY_LEADER: Final = "the leader reads the query, see `nomad-watchdog leader`"


@dataclass(slots=True)
class StagedRollout:
    """The roll-out of one spec."""

    fleet: Fleet
    spec: AgentSpec
    strategy: Strategy
    refused: str = ""
    """Why the scheduler can't be prepared for the spec."""
    turns: RolloutTurns = field(default_factory=RolloutTurns)
    trials: Mapping[Slug, str] = field(default_factory=dict)
    """Devices that should have the spec now → its hash."""
    begun: set[Slug] = field(default_factory=set)
    """Devices whose old agent was stopped for the spec, and whose new one has not been started yet."""
    started: set[Slug] = field(default_factory=set)
    """Devices whose agent was started with the spec, and which is not listed yet."""
    soaked_s: float = 0.0
    """As `RolloutProgress.soaked_s`, with what is not stored yet."""
    going: bool = False
    """Agents may be replaced for it now."""
    heard_from: Monotonic = field(default=Monotonic(0.0))
    """From then on a device of which nothing is known is not waited for."""
    observed: Observed = field(default_factory=Observed)
    """As last observed."""
    measured: Measured = field(default_factory=Measured)
    """What the query of the analysis has shown in this step."""
    _queried_at: Monotonic = field(default=Monotonic(float("-inf")))
    _at: tuple[int, str | None] = (-1, None)
    """Step and group of what follows."""
    _first_steps: Mapping[Slug, int] | None = None
    """As of `rollout_steps.first_steps`; None = not needed since the progress was applied."""
    _soak: Soak = field(default_factory=lambda: Soak(_NO_LIMIT))
    _well: dict[Slug, bool] = field(default_factory=dict)
    """Device of the step → whether it was well before its agent got the spec."""
    _control: frozenset[Slug] | None = None
    """Devices that were well when the step began, or when they had been heard; None = not known yet."""
    _unready: set[Slug] = field(default_factory=set)
    """Devices that were tried, and whose agent of the spec has not been ready since."""
    _ready: int = 0
    _progress_at: Monotonic = field(default=Monotonic(0.0))
    """When another agent became ready, or nothing was to become ready."""
    _is_over: bool = False
    """The spec was given up."""

    @property
    def is_last(self) -> bool:
        """Whether the last step has its turn."""
        return self._at[0] >= len(self.strategy.steps) - 1

    @property
    def is_known(self) -> bool:
        """Whether it is known which devices have their turn."""
        return self._is_over or self._at != (-1, None)

    # -- whose turn it is -----------------------------------------------------------------------

    def follow(self, progress: RolloutProgress) -> None:
        """Apply the stored progress: which devices should have the spec now."""
        at, members = (progress.step, progress.group), list(self._members())
        self._is_over, self._first_steps = False, None
        self.turns = rollout_steps.turns(
            self.strategy.steps, progress.step, progress.group, members
        )
        if at != self._at and members:
            self._at, self.soaked_s = at, progress.soaked_s
            self._soak, self._ready, self._control = Soak(_NO_LIMIT), 0, None
            self._unready.clear()
            self.interrupted()
            self._remember(progress)
        open_now = allowed(self.strategy.allow, self.fleet.clock.wall())
        self.going = not (progress.paused_by or self.refused) and open_now
        turn = self.turns.passed | (self.turns.current - self._soak.died.keys())
        placed = self._placed(turn)
        self.begun = (self.begun & self.turns.current) - self._listed(self.begun)
        self.started -= self._listed(self.started)
        has = placed | self.started  # an agent that is starting must not be replaced again
        # After a start of the control plane nothing is known of a device until its agent reports: replaced before that,
        # it would be no evidence.
        turn = turn - (self.unheard() - has - self.begun) if self.going else turn & has
        self.trials = dict.fromkeys(turn, self.spec.spec_hash)

    def give_up(self, *, keep: bool) -> None:
        """The spec was given up. `keep`: agents that have it stay as they are."""
        kept = self.has_spec() if keep else frozenset()
        self.trials = dict.fromkeys(kept, self.spec.spec_hash)
        self.begun.clear()
        self.started.clear()
        self.going, self._is_over = False, True
        self._at = (-1, None)  # a retry begins the step anew

    def interrupted(self) -> None:
        """Nothing was observed for a while: what did not happen in that time does not count."""
        self._progress_at = self.fleet.clock.monotonic()
        self.measured = Measured()

    def follows(self) -> None:
        """Another replica is the leader, which alone reads the query."""
        self.measured = Measured(words=READ_BY_LEADER)
        if self.strategy.analysis is not None:
            self.observed = replace(self.observed, query_bad="", query_waits=READ_BY_LEADER)

    def first_step(self, slug: Slug) -> int:
        """The number of the first step that has this device, 0 = the first."""
        if self._first_steps is None:
            self._first_steps = rollout_steps.first_steps(self.strategy.steps, self._members())
        return self._first_steps.get(slug, len(self.strategy.steps) - 1)

    def has_died(self, slug: Slug) -> bool:
        """Whether the device's agent of the spec ended too soon in this step."""
        return slug in self._soak.died

    def starts_with_it(self, slug: Slug, move: Move | None = None) -> bool:
        """Whether an agent that is started for a device now, or replaced in place for this reason, gets the spec: if
        the device's step has passed, if its old agent was stopped for it, or in the last step. An agent that is gone
        for another reason gets the proven one."""
        if self._is_over:
            return False
        if slug in self.turns.passed:
            return True
        if slug not in self.trials:
            return False
        # Another replica may have started it since, with the proven spec.
        is_begun = slug in self.begun and not self._listed({slug})
        return is_begun or move is Move.ROLLOUT or (self.is_last and self.going)

    def action_ended(self, action: Action, outcome: ActionOutcome) -> None:
        """An action of a device of the class has ended."""
        if outcome is not ActionOutcome.OK:
            return
        slug = action.slug
        match action.kind:
            case ActionKind.REPLACE:
                self._soak.excuse(slug)
                if action.move is Move.ROLLOUT and slug in self.trials:
                    self.begun.add(slug)
            case ActionKind.START:
                if slug not in self.begun:
                    self._soak.ended(slug, self.fleet.clock.monotonic())
                if self.starts_with_it(slug):
                    self.started.add(slug)
                self.begun.discard(slug)
            case ActionKind.RETIRE:
                self._soak.excuse(slug)

    # -- what became of it ----------------------------------------------------------------------

    def observe(self) -> None:
        """Look at what the step's devices show now."""
        fleet, now = self.fleet, self.fleet.clock.monotonic()
        active = {slug for slug in self.turns.current if not self._is_out_of_reach(slug)}
        has, placed = self.has_spec() & active, self._placed(active)
        self._note_well(active - placed)
        self._note_control()
        self._excuse_replaced()
        self._soak.look(self._runs(has), active & self.trials.keys(), now)
        ready = {slug for slug in has if fleet.agents.has_ready_agent(slug)}
        self._unready = ((self._unready | placed) - ready) & active
        failing = {slug for slug in placed if self._state(slug) is VerdictState.FAILING}
        died = self._soak.died.keys() | failing
        judged = (
            {slug for slug in has if self._was_well(slug)} if self._control is not None else set()
        )
        control = (self._control or frozenset()) - self.turns.passed - placed
        is_waiting = bool(self._unready or self.refused or self.begun & active)
        if len(ready) > self._ready or not is_waiting or not (self.going or self.refused):
            self._progress_at = now
        self._ready = len(ready)
        self.observed = Observed(
            members=len(active - self._soak.died.keys()),
            ready=len(ready - self._soak.died.keys()),
            tried=len(placed | died | self._unready),
            died=len(died),
            bad=sum(self._is_bad(slug) for slug in judged),
            judged=len(judged),
            control_bad=sum(self._is_bad(slug) for slug in control),
            control=len(control),
            without_progress_s=now - self._progress_at,
            refused=self.refused,
            **self._queried(now),
        )

    def _queried(self, now: Monotonic) -> dict[str, str]:
        """The fields of `Observed` of the query."""
        rules = self.strategy.analysis
        if rules is None:
            return {}
        if not (self.going and self.observed.tried):
            self.measured = Measured()  # it is not read
        bad = why_bad(rules, self.measured, now, self.strategy.progress_deadline_s)
        waits = "" if self.measured.passed else self.measured.words
        return {"query_bad": bad, "query_waits": waits}

    async def analyse(self, read: ReadQuery) -> None:
        """Read the query of the analysis, if devices try the spec now and its interval has passed."""
        rules, now, at = self.strategy.analysis, self.fleet.clock.monotonic(), self._at
        if rules is None or not (self.going and self.observed.tried):
            return
        if now - self._queried_at < rules.interval_s:
            return
        self._queried_at = now
        found = await read(rules)
        if self._at == at:
            self.measured = after(rules, self.measured, found, self.fleet.clock.monotonic())

    def _note_well(self, slugs: AbstractSet[Slug]) -> None:
        """Whether these devices, whose agents do not have the spec, are well."""
        for slug in slugs - self.begun:
            # While an agent starts, the last state counts.
            if self._state(slug) is not VerdictState.STARTING:
                self._well[slug] = self._is_well(slug, self.strategy.well_before_s)

    def _note_control(self) -> None:
        """Once per step, when the devices have been heard: those that are well."""
        heard = not self.unheard() or self.fleet.clock.monotonic() > self.heard_from
        if self._control is None and heard:
            self._control = frozenset(
                slug for slug in self.fleet.records if self._is_well(slug, 0.0)
            )

    def _excuse_replaced(self) -> None:
        """Agents whose record has a later epoch were replaced, perhaps by another replica."""
        for slug, epoch in self._soak.epochs().items():
            record = self.fleet.records.get(slug)
            if record is not None and record.epoch > epoch:
                self._soak.excuse(slug)

    def _placed(self, slugs: Iterable[Slug]) -> set[Slug]:
        """Of these: devices with a placement of the spec at the epoch of their record, running or not."""
        records, placements = self.fleet.records, self.fleet.placements
        return {
            slug
            for slug in slugs
            if any(
                one.epoch == records[slug].epoch
                and one.spec_hash == self.spec.spec_hash
                and one.state not in _ENDS
                for one in placements.get(slug, ())
            )
        }

    def _listed(self, slugs: Iterable[Slug]) -> set[Slug]:
        """Of these: devices with a placement at the epoch of their record, and devices that are gone."""
        records, placements = self.fleet.records, self.fleet.placements
        return {
            slug
            for slug in slugs
            if (record := records.get(slug)) is None
            or any(one.epoch == record.epoch for one in placements.get(slug, ()))
        }

    def unwell(self) -> tuple[tuple[str, ...], bool]:
        """For a step that begins: the marks of its devices that are not well, and whether there are too many to be
        stored."""
        marks = sorted(
            rollout_progress.mark(slug)
            for slug in self.turns.current
            if not self._is_well(slug, self.strategy.well_before_s)
        )
        return tuple(marks[:MAX_UNWELL]), len(marks) > MAX_UNWELL

    def _remember(self, progress: RolloutProgress) -> None:
        """Use what was stored of the devices of the step when it began, for those that have the spec already."""
        marks = set(progress.unwell)
        known = frozenset() if progress.crowded else self.turns.current
        self._well = {slug: rollout_progress.mark(slug) not in marks for slug in known}

    def unheard(self) -> frozenset[Slug]:
        """Devices of the step that nothing is known of yet."""
        starting = VerdictState.STARTING
        return frozenset(slug for slug in self.turns.current if self._state(slug) is starting)

    def outages(self) -> frozenset[Slug]:
        """Devices whose outages count with the roll-out: those with the spec that were well before, until their step
        has passed, or until they are back at the proven one."""
        slugs = self.has_spec() if self._is_over else self.has_spec() & self.turns.current
        return frozenset(slug for slug in slugs if self._was_well(slug))

    def unrepaired(self) -> frozenset[Slug]:
        """Devices that must not be repaired by an agent of the spec."""
        return self.has_spec() if self._is_over else self.turns.current & self.trials.keys()

    def has_spec(self) -> frozenset[Slug]:
        """Devices with a live agent of the spec at the epoch of their record."""
        return frozenset(run.slug for run in self._runs(one.slug for one in self._members()))

    def _members(self) -> Iterator[Member]:
        for slug, record in self.fleet.records.items():
            device = record.device
            if record.presence is Presence.PRESENT and device.agent_class == self.spec.agent_class:
                yield Member(slug, device.labels)

    def _is_out_of_reach(self, slug: Slug) -> bool:
        """Whether nothing can be done for a device now: it is paused, or its agent is on a node that does not answer.
        The step passes without it."""
        return self.fleet.presence.is_resting(slug) or any(
            one.state is PlacementState.LOST for one in self.fleet.placements.get(slug, ())
        )

    def _was_well(self, slug: Slug) -> bool:
        return self._well.get(slug, False)

    def _state(self, slug: Slug) -> VerdictState:
        return self.fleet.verdicts.last(slug)[0].state

    def _is_well(self, slug: Slug, for_s: float) -> bool:
        verdict, since = self.fleet.verdicts.last(slug)
        lasted_s = self.fleet.clock.monotonic() - since
        return verdict.state is VerdictState.WATCHED and lasted_s >= for_s

    def _is_bad(self, slug: Slug) -> bool:
        """Whether a device is not well, and its gateway not the cause."""
        if slug not in self.fleet.records or self._state(slug) not in SUSPENDED:
            return False
        report = self.fleet.verdicts.last_report(slug)
        return report is None or not report.gateway_dead

    def _runs(self, wanted: Iterable[Slug]) -> Iterator[ObservedRun]:
        return runs(self.fleet, self.spec, wanted)


def with_unwell(
    fleet: Fleet, spec: AgentSpec, strategy: Strategy, progress: RolloutProgress
) -> RolloutProgress:
    """The progress of a step that begins, with the devices that are not well now."""
    step = StagedRollout(fleet, spec, strategy)
    step.follow(progress)
    marks, crowded = step.unwell()
    return replace(progress, unwell=marks, crowded=crowded)


def publish(trials: TrialDevices, rollouts: Mapping[str, StagedRollout]) -> None:
    """Tell the fleet which outages count with a roll-out, and which devices are not to be repaired. `rollouts`: by
    agent class."""
    outages: dict[Slug, str] = {}
    unrepaired: dict[Slug, str] = {}
    for name, one in rollouts.items():
        outages |= dict.fromkeys(one.outages(), f"class {name}, version {one.spec.version}")
        if not one.strategy.repairs:
            unrepaired |= dict.fromkeys(one.unrepaired(), one.spec.spec_hash)
    trials.rollouts, trials.unrepaired = outages, unrepaired


def runs(fleet: Fleet, spec: AgentSpec, wanted: Iterable[Slug]) -> Iterator[ObservedRun]:
    """The live agents of a spec at the epochs of these devices' records."""
    for slug in wanted:
        record = fleet.records.get(slug)
        if record is None:
            continue
        for one in fleet.placements.get(slug, ()):
            if one.state in _UP and one.epoch == record.epoch and one.spec_hash == spec.spec_hash:
                yield ObservedRun(
                    slug,
                    one.epoch,
                    ",".join(one.instances),
                    one.restarts,
                    one.node,
                    ready=fleet.agents.has_ready_agent(slug),
                    # On a closed host another replica may have it replaced.
                    lost=one.state is PlacementState.LOST or one.node in fleet.hosts.closed,
                )
