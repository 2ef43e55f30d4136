"""What the leader decides about roll-outs, and stores: a version is proven, goes on, or is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Protocol

from nomad_watchdog.controllers.rollout_events import DONE, STARTED, STEP, report, report_given_up
from nomad_watchdog.controllers.rollout_state import PastRollout, RolloutState
from nomad_watchdog.controllers.staged_rollout import StagedRollout, with_unwell
from nomad_watchdog.core import rollout_progress
from nomad_watchdog.core.rollout_progress import RolloutProgress
from nomad_watchdog.core.rollout_soak import Soak
from nomad_watchdog.core.rollout_steps import Strategy
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec

DEFERRAL: Final = (
    "it waits for an operator, because the control plane was upgraded (rollout.upgrades)"
)
SAVE_SOAK_S: Final = 10.0
"""Soak time that is lost at most when another replica becomes the leader, seconds; less for a short soak."""


class RolloutBook(Protocol):
    """What is stored of the roll-outs, and in force."""

    def state(self, name: str) -> RolloutState:
        """What the registry stores of a class."""
        ...

    def strategy(self, name: str) -> Strategy:
        """How the versions of a class are rolled out."""
        ...

    def specs(self) -> Mapping[str, AgentSpec]:
        """Agent class → the spec in force."""
        ...

    async def write(self, name: str, state: RolloutState) -> bool:
        """Store and apply the state of a class; False = another replica was faster. Raises what the registry raises."""
        ...


class RolloutJudge:
    """The decisions of one replica while it is the leader. All methods raise what the registry raises."""

    def __init__(self, fleet: Fleet, book: RolloutBook) -> None:
        self._fleet = fleet
        self._book = book

    async def judge(self, spec: AgentSpec, soak: Soak, wanted: frozenset[Slug]) -> None:
        """Judge a version that is rolled out without steps. `wanted`: the devices that should have it."""
        name = spec.agent_class
        state = self._book.state(name)
        # There is no version to go back to before the first one, so it is never given up.
        if soak.is_bad(len(wanted)) and state.good is not None:
            why = (
                f"agents of {len(soak.died)} devices ended within {soak.limits.soak_s:g} s after they "
                "were ready"
            )
            await self._give_up(name, spec, why)
        elif wanted and soak.is_good(wanted):
            await self._prove(name, spec)

    async def begin(self, name: str, spec: AgentSpec, progress: RolloutProgress) -> None:
        """Store that the roll-out of a spec is at its first step, whatever was rolled out before."""
        first = with_unwell(
            self._fleet,
            spec,
            self._book.strategy(name),
            replace(progress, since=progress.began),
        )
        if await self._book.write(name, replace(self._book.state(name), progress=first)):
            steps = len(self._book.strategy(name).steps)
            how = f"in {steps} steps" if steps > 1 else "in 1 step"
            waits = f"; {DEFERRAL}" if progress.paused_by else ""
            report(self._fleet, name, STARTED, f"version {progress.version}, {how}{waits}")

    async def judge_steps(
        self, name: str, staged: StagedRollout, progress: RolloutProgress, lasted_s: float
    ) -> None:
        """Judge a version that is rolled out in steps, `lasted_s` seconds after the last time, and let it go on."""
        seen, strategy, spec = staged.observed, staged.strategy, staged.spec
        if why := rollout_progress.why_bad(strategy, seen):
            await self._give_up(name, spec, why)
            return
        known = replace(progress, soaked_s=staged.soaked_s)
        if not staged.going:
            return
        after = rollout_progress.advance(strategy, known, seen, staged.turns.groups, lasted_s)
        if (after.step, after.group) == (progress.step, progress.group):
            staged.soaked_s = after.soaked_s
            soak_s = strategy.steps[progress.step].soak_s
            gained_s = abs(after.soaked_s - progress.soaked_s)
            if gained_s and gained_s >= min(SAVE_SOAK_S, soak_s / 10):
                await self._book.write(name, replace(self._book.state(name), progress=after))
            return
        if after.step >= len(strategy.steps):
            await self._prove(name, spec)
            return
        after = replace(
            with_unwell(self._fleet, spec, strategy, after), since=self._fleet.clock.wall()
        )
        passed = rollout_progress.in_words(strategy, progress, staged.turns)
        if await self._book.write(name, replace(self._book.state(name), progress=after)):
            report(self._fleet, name, STEP, f"version {spec.version}: {passed} has passed")

    async def _prove(self, name: str, spec: AgentSpec) -> None:
        state = self._book.state(name)
        proved = await asyncio.to_thread(state.proved, spec)
        if state.good is not None:
            now = self._fleet.clock.wall()
            proved = proved.remembering(PastRollout(spec.version, spec.spec_hash, "done", now))
        if await self._book.write(name, proved) and state.good is not None:
            report(self._fleet, name, DONE, f"version {spec.version} is on all devices")

    async def _give_up(self, name: str, spec: AgentSpec, why: str) -> None:
        """Give up a spec, for this reason. Raises what the registry raises."""
        past = PastRollout(spec.version, spec.spec_hash, "aborted", self._fleet.clock.wall(), why)
        strategy = self._book.strategy(name)
        keeps = bool(strategy.steps) and not strategy.back
        state = replace(self._book.state(name), bad=spec.spec_hash, why=why, keeps=keeps)
        state = state.remembering(past)
        if await self._book.write(name, state):
            report_given_up(self._fleet, spec, self._book.specs()[name], why, keep=keeps)
