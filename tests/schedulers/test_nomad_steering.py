"""Starts that avoid nodes, on a real Nomad with three clients."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pytest
import pytest_asyncio

from nomad_watchdog.clients.nomad import NomadAccess
from nomad_watchdog.clients.nomad_rows import Job
from nomad_watchdog.ids import Slug, slug_of
from nomad_watchdog.model import AgentSpec, Epoch, Monotonic, PlacementState, WallTime
from nomad_watchdog.schedulers import open_hosts
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.schedulers.nomad._steering import KEEP_S, takers
from nomad_watchdog.testing.conformance import record_of
from servers.nomad import NomadServer
from tests.schedulers.conftest import eventually
from tests.schedulers.test_nomad_nodes import row

servers = pytest.mark.servers
MOCK = Path(__file__).with_name("mock.nomad.hcl")
STICKY = MOCK.read_text().replace("{ size = 10 }", "{\n size = 10\n sticky = true\n }")
SPEC = AgentSpec("default", "1", "h", template=str(MOCK), text=STICKY)


FIRST = Epoch(1)


class ManualClock:
    """A clock that stands still until it is set."""

    now = 0.0

    def monotonic(self) -> Monotonic:
        return Monotonic(self.now)

    def wall(self) -> WallTime:
        return WallTime(self.now)


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NomadServer]:
    async with NomadServer(tmp_path_factory.mktemp("nomad"), clients=3) as nomad:
        yield nomad


@asynccontextmanager
async def scheduler_of(
    nomad: NomadServer, strategy: Literal["dispatch", "register"], clock: ManualClock
) -> AsyncIterator[NomadScheduler]:
    one = NomadScheduler(
        settings=NomadAccess(address=nomad.http_addr),
        prefix=f"t-{uuid.uuid4().hex[:8]}",
        strategy=strategy,
        clock=clock,
    )
    try:
        await one.prepare([SPEC])
        yield one
    finally:
        for found in (await one.snapshot()).placements.values():
            for placement in found:
                await one.retire(placement, 1.0)
        await one.close()


async def where(
    scheduler: NomadScheduler, names: list[str], avoid: tuple[str, ...], epoch: Epoch = FIRST
) -> Counter[str]:
    """Start an agent per name one after another, and count their nodes."""
    spec, found = replace(SPEC, avoid=avoid), Counter[str]()
    for name in names:
        slug = slug_of(record_of(name).device.id)

        known = (await scheduler.snapshot([slug])).placements.get(slug, ())
        before = frozenset(instance for one in known for instance in one.instances)

        async def runs(slug: Slug = slug, before: frozenset[str] = before) -> str:
            (one,) = (await scheduler.snapshot([slug])).placements[slug]
            is_new = one.epoch == epoch and not before & set(one.instances)
            return one.node if is_new and one.state is PlacementState.RUNNING else ""

        await scheduler.ensure(record_of(name), epoch, spec)
        found[await eventually(runs)] += 1
    return found


@servers
@pytest.mark.slow_because("starts a Nomad with three clients")
@pytest.mark.parametrize("strategy", ["dispatch", "register"])
@pytest.mark.asyncio(loop_scope="session")
async def test_a_start_goes_to_a_node_that_it_need_not_avoid(
    three: NomadServer, strategy: Literal["dispatch", "register"]
) -> None:
    """Nomad packs agents onto nodes that have some. All of these starts go to the one node that they need not avoid,
    although it is empty. If every node is to be avoided, agents start all the same. A job that is
    updated in place leaves its node, although its disk is sticky."""
    async with scheduler_of(three, strategy, ManualClock()) as scheduler:
        names = sorted(one["Name"] for one in await three.request("GET", "/v1/nodes"))
        assert await open_hosts(scheduler) == frozenset(names)
        (first,) = await where(scheduler, ["a"], tuple(names[1:]))
        assert first == names[0]
        rest = tuple(names[:2])
        assert await where(scheduler, [f"b{n}" for n in range(6)], rest) == {names[2]: 6}
        if strategy == "register":
            moved = await where(scheduler, ["b0", "b1"], (*names[1:],), Epoch(2))
            assert moved == {names[0]: 2}
        assert (await where(scheduler, [f"c{n}" for n in range(3)], tuple(names))).total() == 3


@servers
@pytest.mark.slow_because("starts a Nomad with three clients")
@pytest.mark.asyncio(loop_scope="session")
async def test_a_parent_loses_its_affinity_when_no_start_asks_for_it(three: NomadServer) -> None:
    """A minute after the last start that avoids nodes, the next start restores the parent; so does a control plane that
    prepares it again. No such change touches an agent that runs."""
    clock = ManualClock()
    async with scheduler_of(three, "dispatch", clock) as scheduler:
        parent = f"/v1/job/{quote(scheduler._names.parent('default', 0))}"
        names = sorted(one["Name"] for one in await three.request("GET", "/v1/nodes"))

        async def avoided() -> str:
            found = (await three.request("GET", parent))["Affinities"] or []
            return "; ".join(one["RTarget"] for one in found)

        await where(scheduler, ["a"], (names[0],))
        assert await avoided() == names[0]
        clock.now = KEEP_S
        await where(scheduler, ["b"], ())
        assert await avoided() == names[0]
        clock.now = KEEP_S + 1.0
        await where(scheduler, ["c"], ())
        assert await avoided() == ""
        await where(scheduler, ["d"], (names[1],))
        assert await avoided() == names[1]
        await scheduler.prepare([SPEC])
        assert await avoided() == ""
        await where(scheduler, ["e"], (names[1],))
        assert await avoided() == names[1]
        found = (await scheduler.snapshot()).placements.values()
        assert [one.state for (one,) in found] == [PlacementState.RUNNING] * 5


def test_only_nodes_that_can_take_an_agent_count() -> None:
    """A node in another pool or datacenter, without a healthy driver, that is down, draining or ineligible takes none."""
    job: Job = {
        "ID": "p",
        "NodePool": "edge",
        "Datacenters": ["eu-*"],
        "TaskGroups": [{"Tasks": [{"Driver": "raw_exec"}]}],
    }
    good = {"NodePool": "edge", "Datacenter": "eu-1"}
    rows: list[Any] = [
        row("1", "good", **good),
        row("2", "pool", **good | {"NodePool": "gpu"}),
        row("3", "datacenter", **good | {"Datacenter": "us-1"}),
        row("4", "driver", **good, Drivers={"raw_exec": {"Healthy": False}}),
        row("5", "down", **good, Status="down"),
        row("6", "drained", **good, Drain=True),
        row("7", "ineligible", **good, SchedulingEligibility="ineligible"),
    ]
    assert takers(rows, [job]) == {"good"}
    assert takers(rows, [job, {**job, "NodePool": "all"}]) == {"good", "pool"}
    assert takers(rows, []) == {"good", "pool", "datacenter", "driver"}
