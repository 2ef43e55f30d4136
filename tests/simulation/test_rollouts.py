"""The simulation with roll-outs in steps: their rules hold under faults, and bugs are found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from nomad_watchdog.controllers.rollout import RolloutController
from nomad_watchdog.controllers.staged_rollout import StagedRollout
from nomad_watchdog.core import rollout, rollout_progress
from nomad_watchdog.core.actions import Action, Move
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.core.rollout_progress import Observed, RolloutProgress
from nomad_watchdog.core.rollout_steps import Strategy
from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, Limits
from nomad_watchdog.registry import RegistryDocument
from tests.simulation.planted import assert_found
from tests.simulation.rollout_auditor import FORMAT
from tests.simulation.rollouts import CLASS, RolloutWorld, proven_by, run_seed
from tests.simulation.simulator import SPEC
from tests.simulation.virtual_time import LoopWithThreads

pytestmark = [pytest.mark.usefixtures("yielding"), pytest.mark.timeout(900)]
SEEDS = 100
CHUNK = 5
OFTEN = 10
"""Seeds below this are played by each run, the rest with the long tests."""


@pytest.mark.slow_because("computes 5 histories of roll-outs")
@pytest.mark.parametrize(
    "first",
    [
        *range(0, OFTEN, CHUNK),
        *(pytest.param(n, marks=pytest.mark.long) for n in range(OFTEN, SEEDS, CHUNK)),
    ],
)
def test_every_seed_holds(first: int) -> None:
    """R1 to R5 of `rollout_auditor` hold in histories of good and bad versions, operators, crashes, lost answers and
    changes of the leader. In the end every agent has the version that was completed, or the proven one."""
    for seed in range(first, first + CHUNK):
        assert run_seed(seed).wrong == [], f"python -m tests.simulation.rollouts --seed {seed}"


async def _begins_unread() -> tuple[list[str], list[str]]:
    """A control plane starts with a new version while it can't read the roll-outs, and a device has no agent: the
    versions that are started in the first minute, and after it."""
    world = RolloutWorld(0, Metrics())
    world.weather.calm()
    world.audit.trace.say("begin")
    world.store.commit_document(FORMAT.name, RegistryDocument(proven_by(SPEC)))
    world.spec = AgentSpec(CLASS, "2", "h2")
    replica, readable = world.replicas[0], world.store.document

    def unreadable(name: str) -> RegistryDocument:
        if name == FORMAT.name:
            raise TransientError("it can't be read now")
        return readable(name)

    world.store.document = unreadable  # type: ignore[method-assign]
    async with asyncio.TaskGroup() as world.group:
        replica.start()
        await world._wish(world.names[0], present=True)
        await asyncio.sleep(60.0)
        before = [job.spec.version for job in world.cluster.jobs.values()]
        world.store.document = readable  # type: ignore[method-assign]
        await asyncio.sleep(30.0)
        after = [job.spec.version for job in world.cluster.jobs.values()]
        world._stop()
    return before, after


def test_nothing_starts_before_it_is_known_what_is_proven() -> None:
    """A control plane that can't read the roll-outs waits, and then starts the proven version."""
    with asyncio.Runner(loop_factory=LoopWithThreads) as runner:
        before, after = runner.run(_begins_unread())
    assert (before, after[:1]) == ([], ["1"])


def _joins(self: StagedRollout, slug: Slug, _move: Move | None = None) -> bool:
    return slug in self.trials


def _never_ends(_self: RolloutController, _name: str) -> bool:
    return False


_ADMIT = rollout.admit


def _no_window_for_rollouts(
    candidates: list[Action], readiness: Readiness, *, fleet: int, limits: Limits
) -> tuple[Action, ...]:
    others = [one for one in candidates if one.move is not Move.ROLLOUT]
    mine = tuple(one for one in candidates if one.move is Move.ROLLOUT)
    return (*_ADMIT(others, readiness, fleet=fleet, limits=limits), *mine)


_PROGRESS = RolloutController.progress


def _in_memory(self: RolloutController, name: str) -> RolloutProgress:
    """What was stored before this process has started is not used."""
    stored = _PROGRESS(self, name)
    seen = self.__dict__.setdefault("seen", {})
    first = seen.setdefault(stored.spec, stored)
    if stored != first:
        return stored
    return RolloutProgress(stored.spec, stored.version, stored.began)


def _no_soak(
    strategy: Strategy,
    progress: RolloutProgress,
    seen: Observed,
    groups: tuple[str, ...],
    _lasted_s: float,
) -> RolloutProgress:
    return _ADVANCE(strategy, progress, seen, groups, 3600.0)


_ADVANCE = rollout_progress.advance

PLANTED: dict[str, tuple[object, str, Callable[..., object], set[str]]] = {
    "new and crashed agents join an unproven version": (
        StagedRollout, "starts_with_it", _joins, {"R1"},
    ),
    "an abort is ignored": (RolloutController, "is_given_up", _never_ends, {"R2"}),
    "roll-outs do not wait for room": (rollout, "admit", _no_window_for_rollouts, {"R3"}),
    "a new leader begins anew": (RolloutController, "progress", _in_memory, {"R4"}),
    "a step passes without soak": (rollout_progress, "advance", _no_soak, {"R5"}),
}  # fmt: skip
SHOWN_BY = {
    "new and crashed agents join an unproven version": 9,
    "roll-outs do not wait for room": 11,
    "a new leader begins anew": 20,
    "a step passes without soak": 2,
}
"""Bug → a seed that shows it, if no earlier one does."""


@pytest.mark.slow_because("plays histories until one is broken")
@pytest.mark.parametrize("planted", list(PLANTED))
def test_a_planted_bug_is_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one rule of the real code removed, a seed below 100 shows the promise broken."""
    begin = SHOWN_BY.get(planted, 0)
    assert_found(PLANTED[planted], lambda seed: run_seed(seed).wrong, SEEDS, monkeypatch, begin)
