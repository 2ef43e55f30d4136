"""A reconciler empties nodes that are being drained, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.node_drain import leaving_hosts
from nomad_watchdog.core.node_drain import NO_OTHER, LeavingHost
from nomad_watchdog.events.log import EventLog
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Device, Limits, PlacementState
from nomad_watchdog.schedulers import ClosedHost
from tests.simulation.cluster import Cluster, Pace
from tests.simulation.fakes import FakeRegistry, FakeScheduler, Store
from tests.simulation.simulator import SPEC
from tests.simulation.virtual_time import VirtualClock, VirtualLoop

LIMITS = Limits(replace_at_once=3, replace_fraction=0.0, resync_s=1.0)
SLOW = Pace(place=(0.5, 1.0), start=(0.5, 1.0), die=(1.0, 3.0))


class Plant:
    """Devices, a scheduler with two nodes, and a control plane that can be started again."""

    def __init__(self, count: int) -> None:
        self.cluster, self.store = Cluster(SLOW), Store()
        self.store.initialise("test")
        self.clock = VirtualClock(asyncio.get_running_loop())
        self.history = EventLog()
        self.names = [DeviceId(f"d{number}") for number in range(count)]
        self.most_unready = 0

    async def start(self, limits: Limits = LIMITS) -> None:
        """Start the control plane, as after a crash if there was one."""
        registry, scheduler = FakeRegistry(self.store), FakeScheduler(self.cluster)
        self.fleet = Fleet(registry, limits, self.clock, self.history, receives_reports=False)
        specs = {SPEC.agent_class: SPEC}
        self.metrics = Metrics()
        self.reconciler = Reconciler(self.fleet, scheduler, specs, self.metrics)
        self.task = asyncio.ensure_future(self.reconciler.run())

    async def crash(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task

    async def settled(self, limits: Limits = LIMITS) -> None:
        """A control plane with all agents running."""
        await self.start(limits)
        devices = [Device(name, SPEC.agent_class, "127.0.0.1") for name in self.names]
        await self.fleet.records.register(devices)
        await self.until(lambda: self.running() == len(self.names))
        self.most_unready = 0

    def running(self) -> int:
        """Devices with a running agent."""
        return len({job.slug for job in self.cluster.jobs.values() if self._runs(job.ref)})

    def _runs(self, ref: str) -> bool:
        return self.cluster.state(self.cluster.jobs[ref]) is PlacementState.RUNNING

    def on(self, node: str) -> set[Slug]:
        """Devices whose agent is on a node."""
        jobs = self.cluster.jobs.values()
        return {job.slug for job in jobs if not job.dead and job.run and job.run.node == node}

    async def pause(self, seconds: float) -> None:
        """Let virtual time pass, and note how many devices have no running agent."""
        for _ in range(int(seconds * 10)):
            await asyncio.sleep(0.1)
            self.most_unready = max(self.most_unready, len(self.names) - self.running())

    async def until(self, test: Callable[[], bool]) -> None:
        for _ in range(300):
            if test():
                return
            await self.pause(1.0)
        raise AssertionError("it did not come to that within 300 s")

    def kinds(self) -> list[str]:
        """The kinds of the events about nodes."""
        found = self.fleet.events.all.recent()
        return [event.kind for event in found if event.kind.startswith("node.")]


def play(story: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(_whole(story))


async def _whole(story: Callable[[], Awaitable[None]]) -> None:
    await story()


def test_a_draining_node_is_emptied_within_the_window() -> None:
    """Never more than the window is without a running agent, also if the control plane crashes in the middle; the
    other node has all agents in the end, and each moved once."""

    async def story() -> None:
        plant = Plant(24)
        await plant.settled()
        moved = plant.on("n1")
        assert 4 < len(moved) < 24
        plant.cluster.closed["n1"] = True
        await plant.until(lambda: len(plant.on("n1")) < len(moved) - 3)
        await plant.crash()
        await plant.pause(5.0)
        await plant.start()
        await plant.until(lambda: not plant.on("n1") and plant.running() == 24)
        assert plant.most_unready <= 3
        records = plant.fleet.records.values()
        assert {r.slug for r in records if r.epoch > 1} == moved
        assert all(record.epoch <= 2 for record in records)
        assert plant.kinds() == ["node.draining"]
        await plant.crash()

    play(story)


def test_nothing_moves_while_no_other_node_takes_agents() -> None:
    """That is one event, and another one when it ends; a restart publishes neither again. `status` states it."""

    async def story() -> None:
        plant = Plant(8)
        await plant.settled()
        before = plant.on("n1")
        plant.cluster.closed |= {"n1": True, "n2": False}
        await plant.pause(20.0)
        assert plant.on("n1") == before
        plant.most_unready = 0
        nodes = plant.fleet.views.status()["closed_nodes"]
        assert isinstance(nodes, list)
        agents = len(before)
        assert nodes[0] == {"node": "n1", "state": "draining", "agents": agents, "waits": NO_OTHER}
        assert b"nomad_watchdog_drain_waiting_hosts 1.0" in plant.metrics.render()
        began = ["node.draining", "node.ineligible", "node.drain_waits"]
        assert plant.kinds() == began
        explained = plant.fleet.views.explain(slug_of(_name_on(plant, before)))
        assert explained["next"] == f"replace: node n1 is draining; waits: {NO_OTHER}"
        await plant.crash()
        await plant.start()
        await plant.pause(20.0)
        assert plant.kinds() == began
        del plant.cluster.closed["n2"]
        await plant.until(lambda: not plant.on("n1") and plant.running() == 8)
        assert plant.most_unready <= 3
        assert sorted(plant.kinds()[3:]) == ["node.drain_resumed", "node.open"]
        assert b"nomad_watchdog_drain_waiting_hosts 0.0" in plant.metrics.render()
        await plant.crash()

    play(story)


def _name_on(plant: Plant, slugs: set[Slug]) -> DeviceId:
    return next(name for name in plant.names if slug_of(name) in slugs)


@pytest.mark.parametrize(
    ("leaves", "draining", "moves"),
    [((), True, False), (("draining",), False, False), (("draining", "ineligible"), False, True)],
)
def test_settings_decide_what_is_left(leaves: tuple[str, ...], draining: bool, moves: bool) -> None:
    """With `drain = "wait"` agents stay on a draining node, and without `leave_ineligible` on an ineligible one. A
    reload changes that."""

    async def story() -> None:
        plant = Plant(8)
        nodes = {"n1": ClosedHost(draining, "closed", {"id": draining})}
        expected = [LeavingHost("n1", "closed", frozenset({"id"}))] if moves else []
        assert list(leaving_hosts(nodes, frozenset(leaves))) == expected
        await plant.settled(replace(LIMITS, leaves=frozenset(leaves)))
        before = plant.on("n1")
        plant.cluster.closed["n1"] = True
        await plant.pause(20.0)
        assert (plant.on("n1") != before) is ("draining" in leaves)
        plant.fleet.configure(LIMITS)
        await plant.until(lambda: not plant.on("n1"))
        await plant.crash()

    play(story)


def test_a_cordoned_host_is_left_only_by_its_own_setting() -> None:
    """`kubernetes.leave_cordoned` and not the settings of Nomad."""
    closed = {"n1": ClosedHost(False, "cordoned", is_last=True, cordoned=True)}
    assert not list(leaving_hosts(closed, frozenset({"draining", "ineligible"})))
    (host,) = leaving_hosts(closed, frozenset({"cordoned"}))
    assert host == LeavingHost("n1", "cordoned", is_last=True)


def test_only_the_nodes_of_a_name_that_are_closed_are_left() -> None:
    """Of two nodes of one name, one is being drained and the other is ineligible."""
    closed = {"n1": ClosedHost(True, "draining", {"a": True, "b": False})}
    (host,) = leaving_hosts(closed, frozenset({"draining"}))
    assert host.node_ids == {"a"}
    (host,) = leaving_hosts(closed, frozenset({"draining", "ineligible"}))
    assert host.node_ids == {"a", "b"}
