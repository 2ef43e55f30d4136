"""A reconciler empties a draining node of a real Nomad, in both strategies."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from nomad_watchdog.clients.nomad import NomadAccess
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, Device, Limits
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.schedulers.nomad import NomadScheduler
from servers.nomad import NomadServer
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]

MOCK = str(Path(__file__).with_name("mock.nomad.hcl"))
HOUR_NS = 3600 * 10**9
Strategy = Literal["dispatch", "register"]


@dataclass
class Site:
    """A Nomad with two clients, and a control plane in this process."""

    nomad: NomadServer
    fleet: Fleet
    reconciler: Reconciler
    count: int
    most_unready: int = 0
    strangers: list[str] = field(default_factory=list)
    """Allocations that Nomad moved by itself."""

    async def nodes(self) -> dict[str, str]:
        """The id of each client by name."""
        return {one["Name"]: one["ID"] for one in await self.nomad.request("GET", "/v1/nodes")}

    async def running(self) -> dict[str, list[str]]:
        """The device of each running allocation, by node id."""
        found: dict[str, list[str]] = {}
        for one in await self.nomad.request("GET", "/v1/allocations"):
            if (one.get("DesiredTransition") or {}).get("Migrate"):
                self.strangers.append(one["ID"])
            if one["ClientStatus"] == "running":
                found.setdefault(one["NodeID"], []).append(one["JobID"].rpartition("/")[2])
        return found

    async def sample(self) -> dict[str, list[str]]:
        found = await self.running()
        self.most_unready = max(self.most_unready, self.count - sum(map(len, found.values())))
        return found

    async def drain(self, node: str, spec: dict[str, Any] | None) -> None:
        body = {"DrainSpec": spec, "MarkEligible": spec is None}
        await self.nomad.request("POST", f"/v1/node/{node}/drain", body)

    def reason(self, text: str) -> list[str]:
        """The reasons of the replacements that contain this text."""
        found = self.fleet.events.all.recent()
        return [e.text for e in found if e.kind == "plan.replace" and text in e.text]


@asynccontextmanager
async def site(folder: Path, strategy: Strategy, count: int, limits: Limits) -> AsyncIterator[Site]:
    """All agents run, on both clients."""
    async with NomadServer(folder / "nomad", clients=2) as nomad:
        registry = SqliteRegistry(path=folder / "registry.db")
        scheduler = NomadScheduler(
            settings=NomadAccess(address=nomad.http_addr),
            strategy=strategy,
            prefix=f"t-{uuid.uuid4().hex[:8]}",
        )
        await registry.initialise()
        fleet = Fleet(registry, limits, SystemClock(), receives_reports=False)
        spec = AgentSpec("default", "1", "h", template=MOCK)
        reconciler = Reconciler(fleet, scheduler, {"default": spec}, Metrics())
        task = asyncio.ensure_future(reconciler.run())
        try:
            made = Site(nomad, fleet, reconciler, count)
            devices = [Device(DeviceId(f"d{n}"), "default", "127.0.0.1") for n in range(count)]
            await fleet.records.register(devices)

            async def all_run() -> bool:
                return sum(map(len, (await made.running()).values())) == count

            await eventually(all_run, 90.0)
            yield made
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await scheduler.close()
            await registry.close()


@pytest.mark.slow_because("starts a Nomad with two clients and moves the agents of one")
@pytest.mark.parametrize("strategy", ["dispatch", "register"])
async def test_a_node_is_emptied_long_before_its_deadline(
    tmp_path: Path, strategy: Strategy
) -> None:
    """With the default deadline of an hour the agents leave within the window, each once and at its next epoch, and
    Nomad moves none by itself. The drain is then complete."""
    limits = Limits(replace_at_once=2, replace_fraction=0.0, resync_s=30.0)
    async with site(tmp_path, strategy, 8, limits) as made:
        nodes = await made.nodes()
        before = await made.running()
        node = max(before, key=lambda one: len(before[one]))
        moved = len(before[node])
        (other,) = set(nodes.values()) - {node}
        await made.drain(node, {"Deadline": HOUR_NS, "IgnoreSystemJobs": True})

        async def empty() -> bool:
            found = await made.sample()
            return node not in found and len(found.get(other, ())) == 8

        await eventually(empty, 120.0)
        assert made.most_unready <= 2
        assert not made.strangers

        async def complete() -> bool:
            detail = await made.nomad.request("GET", f"/v1/node/{node}")
            return detail["DrainStrategy"] is None

        await eventually(complete)
        records = made.fleet.records.values()
        assert sorted(record.epoch for record in records) == [1] * (8 - moved) + [2] * moved
        name = next(name for name, one in nodes.items() if one == node)
        assert len(made.reason(f"node {name} is draining until")) == moved


@pytest.mark.slow_because("starts a Nomad with two clients and drains one of them twice")
@pytest.mark.parametrize("strategy", ["dispatch", "register"])
async def test_drains_without_a_deadline_and_forced_ones(
    tmp_path: Path, strategy: Strategy
) -> None:
    """Without a deadline agents leave as with one. A forced drain stops all at once, and each device has one agent on
    the other node again."""
    limits = Limits(replace_at_once=2, replace_fraction=0.0, resync_s=30.0, backoff_initial_s=0.2)
    async with site(tmp_path, strategy, 6, limits) as made:
        first, second = (await made.nodes()).values()

        async def all_on(node: str) -> bool:
            found = await made.sample()
            return list(found) == [node] and len(found[node]) == 6

        await made.drain(first, {"Deadline": 0, "IgnoreSystemJobs": True})
        await eventually(lambda: all_on(second), 120.0)
        assert made.most_unready <= 2
        await made.drain(first, None)
        await made.drain(second, {"Deadline": -1, "IgnoreSystemJobs": True})
        await eventually(lambda: all_on(first), 120.0)
