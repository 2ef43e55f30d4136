"""A drain, the relief of a host, a roll-out in steps and a migration, requested in the same moment for one fleet, in
virtual time: they share one window, and the most urgent reasons come first."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Final

import pytest

from nomad_watchdog.controllers.relief import ReliefController
from nomad_watchdog.core.acceptance import Acceptance, AcceptanceKind
from nomad_watchdog.core.actions import Action, ActionKind, Move
from nomad_watchdog.core.host_load import PressureThresholds
from nomad_watchdog.core.migration import Migration
from nomad_watchdog.core.planner import Plan
from nomad_watchdog.core.relief import ReliefRules
from nomad_watchdog.core.rollout_steps import RolloutStep, Strategy, complete
from nomad_watchdog.host_pressure import HostPressure, Resource, Stall
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, AgentState, PlacementState, Report, WallTime
from nomad_watchdog.registry import RegistryDocument
from tests.controllers.migration.two_sites import MovingReplica, TwoSites, requests_of
from tests.simulation.cluster import Process
from tests.simulation.replica import Replica
from tests.simulation.rollout_auditor import FORMAT
from tests.simulation.rollouts import proven_by
from tests.simulation.simulator import SPEC, play
from tests.simulation.virtual_time import LoopWithThreads

pytestmark = [pytest.mark.usefixtures("yielding"), pytest.mark.timeout(600)]
CLASS: Final = SPEC.agent_class
NEW: Final = AgentSpec(CLASS, "2", "h2")
WINDOW: Final = 2
DEVICES: Final = 12
DRAINED, LOADED = "n0", "n1"
ENDS_S: Final = 900.0
RULES: Final = ReliefRules(
    {Resource.MEMORY: PressureThresholds(high=40.0, low=10.0)},
    looks=1, min_age_s=10.0, cooldown_s=20.0, dry_run=False,
)  # fmt: skip


@dataclass
class BusyReplica(MovingReplica):
    """A control plane process with relief."""

    relief: ReliefController = field(init=False)

    def build(self) -> None:
        super().build()
        made = self.reconciler
        self.relief = ReliefController(self.fleet, made.ownership, self.world.metrics, made.wake)
        made.plan_builder.sources.append(self.relief.requested)
        made.executor.avoids.append(self.relief.avoids)

    def start(self) -> None:
        super().start()
        self._tasks.append(self.world.group.create_task(self.relief.run()))


class BusyFleet(TwoSites):
    """Twelve devices on four nodes and one site."""

    loop = LoopWithThreads

    def __init__(self, seed: int) -> None:
        super().__init__(seed, Metrics())
        self.weather.calm()
        self.board = None
        self.limits = replace(self.limits, replace_at_once=WINDOW, replace_fraction=0.0)
        steps = complete((RolloutStep(count=4, soak_s=5.0),))
        self.strategies = {CLASS: Strategy(steps=steps, well_before_s=10.0)}
        self.cluster.nodes = dict.fromkeys((DRAINED, LOADED, "n2", "n3"), True)
        self.replica = BusyReplica("r0", self)
        self.replicas = [self.replica]
        self.names = [f"dev {n}" for n in range(DEVICES)]
        self._busy = {name: asyncio.Lock() for name in self.names}
        self.ready: set[int] = set()
        """Agents whose last report was accepted, by pid."""
        self.load = 0.0
        self.begun: list[Move] = []
        self.waited: set[str] = set()
        """What `explain` says of those that wait."""
        self.unordered: list[str] = []
        self.most_unready = 0
        planned = self.audit.planned

        def watched(who: str, plan: Plan, *more: object) -> None:
            planned(who, plan, *more)  # type: ignore[arg-type]  # as they came
            self._check_order(plan)

        self.audit.planned = watched  # type: ignore[method-assign]

    async def run(self) -> None:
        self.store.commit_document(FORMAT.name, RegistryDocument(proven_by(SPEC)))
        async with asyncio.TaskGroup() as self.group:
            self.replica.start()
            for name in self.names:
                while not await self._wish(name, present=True):
                    await asyncio.sleep(0.5)
            await asyncio.sleep(60.0)
            assert not self.unready()
            await self._request_all()
            await self._until_done()
            self._stop()

    async def _request_all(self) -> None:
        self.cluster.closed[DRAINED] = True
        self.load = 80.0
        self.replica.relief.configure(RULES)
        move = Migration("m", "north", "south", WallTime(0.0), "test")
        assert await self.replica.serve(requests_of(self.replica.reconciler).begin(move))
        classes = self.replica.reconciler.classes
        await classes.configure({CLASS: NEW}, strategies=self.strategies)

    async def _until_done(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + ENDS_S
        while left := self._left():
            assert loop.time() < until, left
            await asyncio.sleep(0.25)
            self.most_unready = max(self.most_unready, self.unready())
            builder = self.replica.reconciler.plan_builder
            self.waited |= {builder.waits(one) for one in builder.last.waiting}
            if Move.RELIEF in self.begun:
                self.load = 0.0

    def _left(self) -> list[str]:
        """What has not been done yet."""
        found = [] if self.kept().moves[0].done else ["the migration"]
        found += [] if Move.RELIEF in self.begun else ["relief"]
        for job in self.cluster.jobs.values():
            if self.cluster.state(job) is PlacementState.DEAD:
                continue
            at = (self.sites[job.ref], job.spec.version, job.run is not None and job.run.node)
            if at[:2] != ("south", "2") or at[2] == DRAINED:
                found.append(f"{job.device_id}: {at}")
        return found + ["agents"] * self.unready()

    def unready(self) -> int:
        """Devices without an agent whose reports are accepted."""
        found = 0
        for name in self.names:
            record = self.store.record(slug_of(DeviceId(name)))
            assert record is not None
            found += not any(
                one.epoch == record.epoch and one.pid in self.ready
                for one in self.cluster.alive(record.slug)
            )
        return found

    def _check_order(self, plan: Plan) -> None:
        reconciler = self.replica.reconciler

        def is_fresh(one: Action) -> bool:
            is_replaced = one.kind is ActionKind.REPLACE
            return is_replaced and not reconciler.queue.is_active(one.slug)

        begun = [one.move for one in plan.actions if is_fresh(one)]
        halted = CLASS in reconciler.classes.rollouts.halted() | reconciler.classes.behind()
        waits = [
            one.move
            for one in plan.waiting
            if not one.waits_for and (one.move is Move.DRAIN or not halted)
        ]
        self.begun += begun
        if begun and waits and max(begun) > min(waits):
            self.unordered.append(f"{max(begun).name} before {min(waits).name}")

    async def _report(self, process: Process, replica: Replica, sequence: int) -> Acceptance | None:
        pressure = None
        if replica.fleet.pressures.asks(process.slug):
            load = self.load if process.node == LOADED else 2.0
            pressure = HostPressure(Stall(0, 0), Stall(load, load), Stall(0, 0))
        report = Report(
            process.device_id, process.slug, process.epoch, process.instance, sequence,
            ready=True, state=AgentState.OK, was_ready=True, misses=0, confirmed=False,
            reason="", listen="", version=process.spec.version, pressure=pressure,
        )  # fmt: skip
        answer = await replica.serve(replica.fleet.reports.receive(report))
        if answer is not None and answer.kind is AcceptanceKind.ACCEPTED:
            self.ready.add(process.pid)
        return answer


@pytest.mark.slow_because("computes the history of a fleet")
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_all_reasons_at_once_share_one_window(seed: int) -> None:
    """No more devices than the window are ever without a ready agent, no reason begins before a more urgent one that
    could begin, each that waits says for what, and in the end all four requests are met."""
    world = play(seed, lambda: BusyFleet(seed))
    assert world.audit.wrong == []
    assert world.unordered == []
    assert set(world.begun) == {Move.DRAIN, Move.RELIEF, Move.ROLLOUT, Move.MIGRATION}
    assert 1 <= world.most_unready <= WINDOW
    assert any(one.startswith("waits for its turn") for one in world.waited)
    assert "" not in world.waited
