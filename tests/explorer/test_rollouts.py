"""Every interleaving of a roll-out in steps: two devices, a first step of one, two replicas, a crash of an agent, a
restart of a replica, and an abort.

Which device has its turn, which spec a start gets and when a step has passed is decided by the real code
(`core.rollout_steps`, `controllers.staged_rollout`, `core.rollout_progress`). Carrying it out is modelled: a replica
reads the stored state from time to time, stops the agent of a device whose turn it is, and starts what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, Final

import pytest

from nomad_watchdog.controllers.staged_rollout import StagedRollout
from nomad_watchdog.core import rollout_progress, rollout_steps
from nomad_watchdog.core.rollout_progress import Observed, RolloutProgress
from nomad_watchdog.core.rollout_steps import Member, RolloutStep, Strategy, complete
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import AgentSpec, WallTime

OLD, NEW, NONE = "old", "new", ""
SLUGS: Final = tuple(slug_of(DeviceId(name)) for name in ("a", "b"))
MEMBERS: Final = tuple(Member(slug, {}) for slug in SLUGS)
SPEC: Final = AgentSpec("default", "2", NEW)
STRATEGY: Final = Strategy(steps=complete((RolloutStep(count=1),)))


@dataclass(frozen=True, slots=True)
class Stored:
    """What the registry stores."""

    step: int = 0
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Replica:
    """`read`: as last read; None = nothing since its start."""

    read: Stored | None = None
    begun: frozenset[int] = frozenset()
    """Devices whose agent it has stopped for the spec."""


@dataclass(frozen=True, slots=True)
class World:
    stored: Stored = Stored()
    agents: tuple[str, ...] = (OLD, OLD)
    """By device: the spec of its agent; NONE = it has none."""
    crashed: frozenset[int] = frozenset()
    """Devices whose last agent ended by itself."""
    replicas: tuple[Replica, ...] = (Replica(), Replica())
    faults: int = 2

    def put(self, r: int, one: Replica, **more: object) -> World:
        return replace(self, replicas=(*self.replicas[:r], one, *self.replicas[r + 1 :]), **more)  # type: ignore[arg-type]

    def agent(self, d: int, spec: str, crashed: frozenset[int]) -> World:
        return replace(
            self, agents=(*self.agents[:d], spec, *self.agents[d + 1 :]), crashed=crashed
        )


@cache
def staged(read: Stored, begun: frozenset[int]) -> StagedRollout:
    """The real roll-out of a replica that has read this."""
    # The fleet is modelled: nothing is listed at the epoch of a device whose agent was stopped.
    records = dict.fromkeys(SLUGS, SimpleNamespace(epoch=2))
    fleet: Any = SimpleNamespace(records=records, placements={})
    one = StagedRollout(fleet, SPEC, STRATEGY)
    one.turns = rollout_steps.turns(STRATEGY.steps, read.step, None, MEMBERS)
    one._at, one._is_over, one.going = (read.step, None), read.bad, not read.bad
    turn = frozenset() if read.bad else one.turns.passed | one.turns.current
    one.trials = dict.fromkeys(turn, SPEC.spec_hash)
    one.begun = {SLUGS[d] for d in begun}
    return one


@dataclass(frozen=True, slots=True)
class Model:
    """Possible next steps. `reads`, `obeys`, `listed`, `asks`: the rules, one of which a test leaves out."""

    reads: bool = True
    """A replica starts nothing before it has read what is stored."""
    obeys: bool = True
    """A version that was given up is not on trial."""
    listed: bool = True
    """A replica knows that another one has started the agent of a device that it had stopped itself."""
    asks: bool = True
    """A start asks whether the spec is on trial for this device, and was stopped for it."""

    def steps(self, world: World) -> Iterator[tuple[str, World]]:
        for r, one in enumerate(world.replicas):
            if one.read != world.stored:
                known = frozenset() if world.stored.bad else one.begun
                yield "read", world.put(r, Replica(world.stored, known))
            if one.read is not None or not self.reads:
                yield from self._acts(world, r, one)
        yield from self._judge(world)
        if not world.stored.bad and world.stored.step < len(STRATEGY.steps):
            yield "abort", replace(world, stored=replace(world.stored, bad=True))
        if world.faults:
            worse = replace(world, faults=world.faults - 1)
            for r in range(len(world.replicas)):
                yield "restart", worse.put(r, Replica())
            for d, agent in enumerate(world.agents):
                if agent:
                    yield "crash", worse.agent(d, NONE, world.crashed | {d})

    def _acts(self, world: World, r: int, one: Replica) -> Iterator[tuple[str, World]]:
        read = one.read or Stored(len(STRATEGY.steps))
        mine = staged(replace(read, bad=read.bad and self.obeys), one.begun)
        for d, slug in enumerate(SLUGS):
            wanted = mine.trials.get(slug, OLD)
            if world.agents[d] == NONE:
                gets_new = mine.starts_with_it(slug) if self.asks else slug in mine.trials
                what = f"start {NEW if gets_new else OLD} {d} by {r}"
                started = world.agent(d, NEW if gets_new else OLD, world.crashed - {d})
                forget = [q for q in range(len(world.replicas)) if q == r or self.listed]
                for q in forget:
                    known = started.replicas[q]
                    started = started.put(q, replace(known, begun=known.begun - {d}))
                yield what, started
            elif world.agents[d] != wanted:
                for_it = one.begun | {d} if wanted == NEW else one.begun
                stopped = world.agent(d, NONE, world.crashed - {d})
                yield "stop", stopped.put(r, replace(one, begun=for_it))

    def _judge(self, world: World) -> Iterator[tuple[str, World]]:
        """The leader lets the step pass when its agents are ready."""
        step = world.stored.step
        if world.stored.bad or step >= len(STRATEGY.steps):
            return
        current = rollout_steps.turns(STRATEGY.steps, step, None, MEMBERS).current
        ready = sum(world.agents[d] == NEW for d, slug in enumerate(SLUGS) if slug in current)
        seen = Observed(members=len(current), ready=ready)
        progress = RolloutProgress(NEW, "2", WallTime(0.0), step=step)
        after = rollout_progress.advance(STRATEGY, progress, seen, (), 1.0).step
        if after != step:
            yield "pass", replace(world, stored=replace(world.stored, step=after))


def broken(world: World, what: str) -> str:
    """The rule that a step breaks; "" = none."""
    if not what.startswith(f"start {NEW}"):
        return ""
    d, r = int(what.split()[2]), int(what.split()[4])
    turns = rollout_steps.turns(STRATEGY.steps, world.stored.step, None, MEMBERS)
    read = world.replicas[r].read
    if read is not None and read.bad:
        return "R2: it starts although it was given up, and this replica knows"
    if SLUGS[d] not in turns.passed | turns.current:
        return "R1: no step includes the device"
    is_last = world.stored.step >= len(STRATEGY.steps) - 1
    if d in world.crashed and SLUGS[d] not in turns.passed and not is_last:
        return "R1: the agent before was not stopped for it"
    return ""


def explored(model: Model) -> tuple[int, str]:
    """The number of states, and the first violation. In the end the version is on all devices, or on none."""
    seen, left = {World()}, [World()]
    while left:
        world = left.pop()
        following = list(model.steps(world))
        calm = [after for what, after in following if what not in ("abort", "restart", "crash")]
        ends = {OLD} if world.stored.bad else {NEW}
        if not calm and set(world.agents) != ends:
            return len(seen), f"L1: it ends as {world.agents}"
        for what, after in following:
            if why := broken(world, what):
                return len(seen), why
            if after not in seen:
                seen.add(after)
                left.append(after)
    return len(seen), ""


def test_no_agent_joins_an_unproven_version_in_any_order() -> None:
    """In any order of reads, stops, starts, crashes, restarts and an abort, only a device whose turn it is gets the new
    version, a crashed agent never before the last step, and none from a replica that knows of the abort."""
    states, why = explored(Model())
    assert why == ""
    assert states > 1_000


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (Model(reads=False), "R1"),
        (Model(obeys=False), "R2"),
        (Model(asks=False), "R1"),
        (Model(listed=False), "R1"),
    ],
)
def test_without_a_rule_it_is_found(model: Model, rule: str) -> None:
    """Each rule is needed: without it, some order breaks what it keeps."""
    assert explored(model)[1].startswith(rule)
