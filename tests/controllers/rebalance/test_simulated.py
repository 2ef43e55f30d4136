"""A new node is filled by a rebalance, in virtual time, with replicas that crash."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from nomad_watchdog.controllers.rebalance_requests import RebalanceRequests
from nomad_watchdog.controllers.rebalance_state import FORMAT
from nomad_watchdog.core.rebalance import Rebalance, RebalanceState
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import WallTime
from tests.simulation.cluster import Job
from tests.simulation.lease_board import Board
from tests.simulation.replica import Replica
from tests.simulation.simulator import World, play

pytestmark = [pytest.mark.usefixtures("yielding"), pytest.mark.timeout(600)]
WINDOW = 3
DEVICES = 24
ENDS_S = 900
"""Virtual seconds within which a rebalance of this fleet has ended, in spite of crashes."""


class Growing(World):
    """Two replicas with four shards, 24 devices on two nodes, and a third node that is added."""

    def __init__(self, seed: int, *, crashes: bool, steers: bool = True) -> None:
        super().__init__(seed, Metrics())
        self.weather.calm()
        self.crashes, self.steers = crashes, steers
        self.limits = replace(self.limits, replace_at_once=WINDOW, replace_fraction=0.0)
        self.cluster.nodes = {"n0": True, "n1": True}
        self.board = Board(4, blurred=False)
        self.replicas = [Replica(f"r{n}", self) for n in range(2)]
        self.names = [f"dev {n}" for n in range(DEVICES)]
        self._busy = {name: asyncio.Lock() for name in self.names}
        self.most_without = 0
        self.starts: Counter[str] = Counter()
        """Starts per device since the rebalance was requested."""
        self.kinds: list[str] = []

    def kept(self) -> Rebalance:
        found = FORMAT.decode(self.store.document("rebalance").body)
        assert found is not None
        return found

    def counts(self) -> dict[str, int]:
        found = Counter(process.node for process in self.cluster.processes.values())
        return {node: found[node] for node in self.cluster.nodes}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as self.group:
            for replica in self.replicas:
                replica.start()
            for name in self.names:
                while not await self._wish(name, present=True):
                    await asyncio.sleep(0.5)
            await asyncio.sleep(90.0)
            await self._grow()
            for replica in self.replicas:
                if replica.up:
                    self.kinds += [event.kind for event in replica.fleet.events.own.recent()]
            self._stop()

    async def _grow(self) -> None:
        self.cluster.nodes["n2"] = True
        self.cluster.on_start = self._started
        new = Rebalance("r", WallTime(1.0), "test")
        while not await self._begin(new):
            await asyncio.sleep(1.0)
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not self.kept().is_over or self.kept().going:
            if loop.time() - began > ENDS_S:
                self.audit.broken("L1", f"the rebalance does not end: {self.kept()}")
                return
            if self.crashes and self.chance.random() < 0.05:
                await self._crash()
            await asyncio.sleep(1.0)
            with_agent = {process.slug for process in self.cluster.processes.values()}
            self.most_without = max(self.most_without, DEVICES - len(with_agent))

    def _started(self, job: Job) -> None:
        self.starts[job.device_id] += 1
        if not self.steers:
            job.spec = replace(job.spec, avoid=("n2",))

    async def _begin(self, new: Rebalance) -> bool:
        up = [one for one in self.replicas if one.up]
        if not up:
            return False
        reconciler = up[-1].reconciler
        requests = RebalanceRequests(reconciler.fleet, reconciler.movers.rebalances)
        return await up[-1].serve(requests.begin(new)) is not None


@pytest.mark.slow_because("computes the history of a fleet")
@pytest.mark.parametrize("seed", range(6))
def test_a_new_node_is_filled_within_the_window(seed: int) -> None:
    """Each node ends with 8 of 24 agents. Of two replicas with their own shards, together never more than the window has
    no agent, and no device moves twice. In half of the histories replicas crash at any moment."""
    world = play(seed, lambda: Growing(seed, crashes=bool(seed % 2)))
    assert world.audit.wrong == []
    assert world.kept().state is RebalanceState.DONE
    assert world.kept().reason == "3 hosts have 8 to 8 agents each" or seed % 2
    counts = world.counts().values()
    assert max(counts) - min(counts) <= 1
    assert world.most_without <= WINDOW
    assert set(world.starts.values()) == {1}
    if not seed % 2:
        assert world.starts.total() == world.kept().arrived
        assert world.kinds.count("rebalance.started") == world.kinds.count("rebalance.done") == 1


@pytest.mark.slow_because("computes the history of a fleet")
def test_a_scheduler_that_ignores_the_request_ends_it_after_a_few_moves() -> None:
    """Agents come back to the nodes that they left: the new node is left out, the others are balanced."""
    world = play(1, lambda: Growing(1, crashes=False, steers=False))
    assert world.audit.wrong == []
    assert world.kept().is_over
    assert world.counts()["n2"] == 0
    assert set(world.starts.values()) == {1}
    assert world.starts.total() <= 12
