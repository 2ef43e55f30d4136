"""One class's roll-out in steps, as one replica sees it: whose turn it is, and what became of the devices tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.controllers.rollout_state import MAX_UNWELL
from nomad_watchdog.core import rollout_progress, rollout_steps
from nomad_watchdog.core.actions import Action, ActionKind, ActionOutcome, Move
from nomad_watchdog.core.allowed_times import allowed
from nomad_watchdog.core.rollout_progress import Observed, RolloutProgress
from nomad_watchdog.core.rollout_soak import ObservedRun, Soak, SoakLimits
from nomad_watchdog.core.rollout_steps import Member, RolloutTurns, Strategy
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.trials import SUSPENDED
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    AgentSpec,
    Monotonic,
    PlacementState,
    Presence,
    VerdictState,
)

_UP: Final = (PlacementState.RUNNING, PlacementState.LOST)
_NO_LIMIT: Final = SoakLimits(soak_s=float("inf"))
"""An agent on trial that was ready and ends before its step has passed has ended too soon."""


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
    soaked_s: float = 0.0
    """As `RolloutProgress.soaked_s`, with what is not stored yet."""
    going: bool = False
    """Agents may be replaced for it now."""
    observed: Observed = field(default_factory=Observed)
    """As last observed."""
    _at: tuple[int, str | None] = (-1, None)
    """RolloutStep and group of what follows."""
    _soak: Soak = field(default_factory=lambda: Soak(_NO_LIMIT))
    _well: dict[Slug, bool] = field(default_factory=dict)
    """Device of the step → whether it was well before its agent got the spec."""
    _control: frozenset[Slug] = frozenset()
    """Devices without the spec that were well when the step began."""
    _ready: int = 0
    _progress_at: Monotonic = field(default=Monotonic(0.0))
    """When another agent became ready, or nothing was to become ready."""

    @property
    def is_last(self) -> bool:
        """Whether the last step has its turn."""
        return self._at[0] >= len(self.strategy.steps) - 1

    # -- whose turn it is -----------------------------------------------------------------------

    def follow(self, progress: RolloutProgress) -> None:
        """Apply the stored progress: which devices should have the spec now."""
        now, at = self.fleet.clock.monotonic(), (progress.step, progress.group)
        members = list(self._members())
        self.turns = rollout_steps.turns(
            self.strategy.steps, progress.step, progress.group, members
        )
        if at != self._at:
            self._at, self.soaked_s = at, progress.soaked_s
            self._soak, self._ready = Soak(_NO_LIMIT), 0
            self._progress_at = now
            self._control = frozenset(
                slug for slug in self.fleet.records if self._is_well(slug, 0.0)
            )
            self._remember(progress)
        open_now = allowed(self.strategy.allow, self.fleet.clock.wall())
        self.going = not (progress.paused_by or self.refused) and open_now
        current = self.turns.current - self._soak.died.keys()
        has = self.has_spec()
        # After a start of the control plane nothing is known of a device until its agent reports: replaced before that,
        # it would be no evidence.
        current = current & has if not self.going else current - (self.unheard() - has - self.begun)
        turn = self.turns.passed | current
        self.trials = dict.fromkeys(turn, self.spec.spec_hash)

    def give_up(self, *, keep: bool) -> None:
        """The spec was given up. `keep`: agents that have it stay as they are."""
        kept = self.has_spec() if keep else frozenset()
        self.trials = dict.fromkeys(kept, self.spec.spec_hash)
        self.begun.clear()
        self.going = False
        self._at = (-1, None)  # a retry begins the step anew

    def starts_with_it(self, slug: Slug, move: Move | None = None) -> bool:
        """Whether an agent that is started for a device now, or replaced in place for this reason, gets the spec: if the device's step has passed, if its
        old agent was stopped for it, or in the last step. An agent that is gone for another reason gets the proven
        one."""
        if slug not in self.trials:
            return False
        if slug in self.turns.passed or slug in self.begun or move is Move.ROLLOUT:
            return True
        return self.is_last and self.going

    def action_ended(self, action: Action, outcome: ActionOutcome) -> None:
        """An action of a device of the class has ended."""
        if outcome is not ActionOutcome.OK:
            return
        match action.kind:
            case ActionKind.REPLACE:
                self._soak.excuse(action.slug)
                if action.move is Move.ROLLOUT and action.slug in self.trials:
                    self.begun.add(action.slug)
            case ActionKind.START:
                self.begun.discard(action.slug)
            case ActionKind.RETIRE:
                self._soak.excuse(action.slug)

    # -- what became of it ----------------------------------------------------------------------

    def observe(self) -> None:
        """Look at what the step's devices show now."""
        fleet, now = self.fleet, self.fleet.clock.monotonic()
        active = {slug for slug in self.turns.current if not fleet.presence.is_resting(slug)}
        has = self.has_spec() & active
        for slug in active - has - self.begun:
            if (
                self._state(slug) is not VerdictState.STARTING
            ):  # else it is the last state that counts
                self._well[slug] = self._is_well(slug, self.strategy.well_before_s)
        self._soak.look(self._runs(has), active & self.trials.keys(), now)
        failing = {slug for slug in has if self._state(slug) is VerdictState.FAILING}
        died = self._soak.died.keys() | failing
        ready = sum(fleet.agents.has_ready_agent(slug) for slug in has)
        judged = {slug for slug in has if self._was_well(slug)}
        control = self._control - self.turns.passed - has
        is_waiting = len(has) > ready or bool(self.refused) or bool(self.begun & active)
        if ready > self._ready or not is_waiting or not (self.going or self.refused):
            self._progress_at = now
        self._ready = ready
        self.observed = Observed(
            members=len(active - self._soak.died.keys()),
            ready=ready,
            tried=len(has | died),
            died=len(died),
            bad=sum(self._is_bad(slug) for slug in judged),
            judged=len(judged),
            control_bad=sum(self._is_bad(slug) for slug in control),
            control=len(control),
            without_progress_s=now - self._progress_at,
            refused=self.refused,
        )

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

    def outages(self) -> Iterator[Slug]:
        """Devices whose outages count with the roll-out: those with the spec that were well before."""
        return (slug for slug in self.has_spec() & self.turns.current if self._was_well(slug))

    def has_spec(self) -> frozenset[Slug]:
        """Devices with a live agent of the spec at the epoch of their record."""
        return frozenset(run.slug for run in self._runs(self.turns.current | self.turns.passed))

    def _members(self) -> Iterator[Member]:
        for slug, record in self.fleet.records.items():
            device = record.device
            if record.presence is Presence.PRESENT and device.agent_class == self.spec.agent_class:
                yield Member(slug, device.labels)

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
                    lost=one.state is PlacementState.LOST,
                )
