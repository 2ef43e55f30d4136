"""One simulated control plane process: the real loop over the fakes, killed and started again at
any time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.core.planner import Plan
from nomad_watchdog.core.rollout_steps import Strategy
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, Limits, Placement, PlacementState
from nomad_watchdog.replicas.leases import Leases, SoleOwner
from tests.simulation.auditor import Auditor
from tests.simulation.cluster import Cluster
from tests.simulation.fakes import FakeRegistry, FakeScheduler, Store
from tests.simulation.faults import BadLine, Weather
from tests.simulation.lease_board import Board, BoardLeases
from tests.simulation.virtual_time import VirtualClock

T = TypeVar("T")


class Surroundings(Protocol):
    """The environment of a replica."""

    chance: random.Random
    weather: Weather
    store: Store
    cluster: Cluster
    metrics: Metrics
    limits: Limits
    spec: AgentSpec
    strategies: Mapping[str, Strategy]
    """Agent class → how its versions are rolled out; others roll out at once."""
    board: Board | None
    """None = no leases, the worst case."""
    group: asyncio.TaskGroup
    over: bool

    @property
    def audit(self) -> Auditor: ...


class WatchedReconciler(Reconciler):
    """The real one, with each of its plans checked (S7)."""

    audit: Auditor
    who: str

    def reconcile(self) -> Plan:
        confirmed = self.breaker.confirmed
        plan = super().reconcile()
        seen = sum(
            one.state is not PlacementState.DEAD
            for found in self.fleet.placements.values()
            for one in found
        )
        self.audit.planned(self.who, plan, confirmed, seen)
        return plan


class WatchedScheduler(FakeScheduler):
    """The fake, with stops checked when they arrive (S7)."""

    def __init__(self, cluster: Cluster, line: BadLine, owner: str, audit: Auditor) -> None:
        super().__init__(cluster, line, owner)
        self._audit = audit

    async def retire(self, placement: Placement, grace_s: float) -> None:
        def effect() -> None:
            self._audit.stopped(self._owner, placement.ref)
            self._cluster.retire(placement.ref, grace_s)

        await self._line.call("scheduler.retire", effect)


@dataclass
class Replica:
    """One control plane process: killed hard and started again at any time."""

    name: str
    world: Surroundings
    fleet: Fleet = field(init=False)
    reconciler: Reconciler = field(init=False)
    clock: VirtualClock = field(init=False)
    up: bool = False
    _line: BadLine = field(init=False)
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    def build(self) -> None:
        """A new process with nothing in memory; without a board it believes that it holds all
        shards."""
        world = self.world
        self.clock = VirtualClock(asyncio.get_running_loop(), world.chance.uniform(1e9, 2e9))
        self._line = BadLine(world.weather, self.crash)
        registry = FakeRegistry(world.store, self._line)
        scheduler = self._scheduler()
        self.fleet = Fleet(registry, world.limits, self.clock)
        specs = {world.spec.agent_class: world.spec}
        self.leases: Leases = SoleOwner()
        if world.board is not None:
            self.leases = BoardLeases(world.board, self.name, self.clock, world.weather)
        reconciler = WatchedReconciler(
            self.fleet, scheduler, specs, world.metrics, self.leases, strategies=world.strategies
        )
        reconciler.audit, reconciler.who = world.audit, self.name
        self.reconciler = reconciler

    def _scheduler(self) -> WatchedScheduler:
        world = self.world
        return WatchedScheduler(world.cluster, self._line, self.name, world.audit)

    def start(self) -> None:
        """Run until a crash."""
        self.build()
        self.up = True
        self.world.audit.trace.say(f"{self.name} starts")
        self._tasks = [self.world.group.create_task(self._live(self.reconciler))]

    async def _live(self, reconciler: Reconciler) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.leases.run())
                group.create_task(reconciler.run())
        except (WatchdogError, ExceptionGroup) as error:
            self.world.audit.broken("L2", f"{self.name} ended by itself: {error!r}")

    def crash(self) -> None:
        """Like kill -9: requests on the wire arrive, nothing else happens, memory is lost."""
        if not self.up:
            return
        self.up = False
        self._line.dead = True
        self.world.audit.trace.say(f"{self.name} dies")
        loop = asyncio.get_running_loop()
        for task in self._tasks:
            loop.call_soon(task.cancel)
        self._tasks = []
        loop.call_later(self.world.chance.uniform(0.1, 10.0), self._again)

    def _again(self) -> None:
        if not self.world.over:
            self.start()

    async def serve(self, call: Coroutine[Any, Any, T]) -> T | None:
        """Have the process answer one request; None when it died or could not."""
        task = self.world.group.create_task(self._answer(call))
        self._tasks.append(task)
        await asyncio.wait({task})
        if task in self._tasks:
            self._tasks.remove(task)
        return None if task.cancelled() else task.result()

    @staticmethod
    async def _answer(call: Coroutine[Any, Any, T]) -> T | None:
        try:
            return await call
        except WatchdogError:
            return None
