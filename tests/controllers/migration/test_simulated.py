"""Migrations between two schedulers in virtual time, under the faults of the simulation."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

from nomad_watchdog.controllers import migration
from nomad_watchdog.controllers.migration import MigrationController
from nomad_watchdog.core.migration import Migration
from nomad_watchdog.core.planner import NO_STOPS
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, WallTime
from nomad_watchdog.schedulers.multi import MultiScheduler
from nomad_watchdog.testing.conformance import record_of
from tests.controllers.migration.two_sites import TwoSites, requests_of, run_seed
from tests.simulation.simulator import BEAT_S
from tests.simulation.virtual_time import VirtualLoop

pytestmark = [pytest.mark.usefixtures("yielding"), pytest.mark.timeout(900)]
SEEDS = 120
CHUNK = 20
OFTEN = 20
"""Seeds below this run each time, the rest with the long tests."""


@pytest.mark.slow_because("computes 20 histories of a fleet")
@pytest.mark.parametrize(
    "first",
    [
        *range(0, OFTEN, CHUNK),
        *(pytest.param(n, marks=pytest.mark.long) for n in range(OFTEN, SEEDS, CHUNK)),
    ],
)
def test_promises_hold_while_a_fleet_moves_under_faults(first: int) -> None:
    """In each of 120 histories of migrations, pauses, undos, crashes, lost answers, late requests, sites that can't be
    listed and changes of `backend`, no epoch is ever on two schedulers, two agents never run at once, and no old one is
    accepted. In the end every device has one agent, where the operator wanted it."""
    said: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        outcome = run_seed(seed)
        assert outcome.wrong == [], (seed, outcome.wrong[:3], outcome.lines[-40:])
        said.update(outcome.said)
    assert min(said[what] for what in ("begin", "pause", "undo")) > 0, said


class Calm(TwoSites):
    """A fleet in which every device is present and migrates once, without any faults."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, Metrics())
        self.weather.calm()
        self.gaps: dict[str, float] = {}
        self._without_since: dict[str, float] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as self.group:
            for replica in self.replicas:
                replica.start()
            await self._calm_fleet()
            self._stop()

    async def _calm_fleet(self) -> None:
        for name in self.names:
            while not await self._wish(name, present=True):
                await asyncio.sleep(0.5)
        await asyncio.sleep(60.0)
        before = self.store.on_write

        def written(old: DeviceRecord | None, new: DeviceRecord) -> None:
            before(old, new)
            name = new.device.id
            if old is not None and old.epoch != new.epoch:
                self._without_since[name] = self.audit.now()
            elif new.instance and name in self._without_since:
                self.gaps[name] = self.audit.now() - self._without_since.pop(name)

        self.store.on_write = written
        move = Migration("m", "north", "south", WallTime(0.0), "test")
        replica = self.replicas[0]
        assert await replica.serve(requests_of(replica.reconciler).begin(move)) is not None
        for _ in range(400):
            await asyncio.sleep(1.0)
            if self.kept().moves[0].done:
                return
        self.audit.broken("L1", "the move did not end")


@pytest.mark.parametrize("seed", range(6))
def test_a_move_costs_one_stop_and_one_start(seed: int) -> None:
    """From the commit of the new epoch to the first accepted report on the other side, every device takes no longer
    than the slowest stop (8 s), place and start (5 s), first report (3 s) and one more report interval."""
    world = Calm(seed)
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(world.run())
    assert world.audit.wrong == []
    assert world.gaps.keys() == set(world.names)
    assert max(world.gaps.values()) <= 8.0 + 5.0 + 3.0 + 1.2 * BEAT_S
    assert {world.sites[job.ref] for job in world.cluster.jobs.values() if not job.dead} == {
        "south"
    }


def test_the_simulation_sees_an_agent_that_starts_elsewhere_than_its_record_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a start went to a random scheduler, some history would have an epoch on both."""
    monkeypatch.setattr(MultiScheduler, "ensure", _ensure_anywhere)
    begin = 30  # found it when this was written
    seeds = (*range(begin, 100), *range(begin))
    wrong = (one for seed in seeds for one in run_seed(seed).wrong)
    assert any(one.startswith(("S2", "S3")) for one in wrong)


async def _starts(home: str, read_ago_s: float) -> list[str]:
    """What a replica that lists only one site would start: a device that lives at `home`, and whose agent it does not
    see. `read_ago_s`: age of its copy of the migrations document."""
    world = TwoSites(0, Metrics())
    world.weather.calm()
    replica = world.replicas[0]
    replica.build()
    reconciler, fleet = replica.reconciler, replica.fleet
    await reconciler.migrations.refresh()
    at = {"epoch": Epoch(3), "instance": "i", "home": home, "index": 1}
    fleet.records.learn([replace(record_of("cam 1"), **at)])
    reconciler.migrations.seen(fleet.records.values())
    await asyncio.sleep(read_ago_s)
    fleet.apply_placements({})
    return [one.kind.value for one in reconciler.plan_builder.make(NO_STOPS).actions]


def test_nothing_is_decided_without_knowing_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica starts no second agent if the first may be on a scheduler that it does not know, or if its copy of the
    migrations document is too old (S3)."""

    def starts(home: str, read_ago_s: float) -> list[str]:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(_starts(home, read_ago_s))

    assert starts("", 0.0) == ["start"]
    assert starts("", migration.FRESH_S + 1.0) == []
    assert starts("south", 0.0) == []
    monkeypatch.setattr(MigrationController, "unsure", lambda _self, _records: frozenset())
    assert starts("", migration.FRESH_S + 1.0) == ["start"]
    assert starts("south", 0.0) == ["start"]


async def _ensure_anywhere(
    self: MultiScheduler, record: DeviceRecord, epoch: Epoch, spec: AgentSpec
) -> int:
    name = random.choice(sorted(self.parts))
    await self.parts[name].ensure(record, epoch, spec)
    self._last += 1
    return self._last
