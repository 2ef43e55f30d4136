"""The API and the command line of rebalances, over a real server and registry; a scheduler in memory."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.cli.main import _code
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.rebalance_requests import RebalanceRequests
from nomad_watchdog.controllers.rebalance_state import FORMAT
from nomad_watchdog.core.host_balance import plan_moves
from nomad_watchdog.core.pauses import Target
from nomad_watchdog.core.rebalance import (
    MAX_AT_ONCE,
    MAX_MOVED,
    AgentsByHost,
    Going,
    Rebalance,
    RebalanceState,
    _avoided,
    mark,
)
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import (
    AgentSpec,
    AgentState,
    Device,
    Epoch,
    Report,
    VerdictState,
    WallTime,
)
from nomad_watchdog.registry import MAX_DOCUMENT
from tests.api.conftest import ServedApi, served
from tests.simulation.fakes import Cluster, FakeScheduler

DEVICES = 8
SPEC = AgentSpec("default", "1", "h")


class Plane:
    """A reconciler over a cluster with two nodes, agents that report, and the API."""

    def __init__(self, served_api: ServedApi) -> None:
        self.served_api = served_api
        self.cluster = Cluster(nodes={"n1": True})
        self.reconciler = Reconciler(
            served_api.fleet, FakeScheduler(self.cluster), {"default": SPEC}, served_api.metrics
        )
        served_api.app[CONTEXT].rebalances = RebalanceRequests(
            served_api.fleet, self.reconciler.movers.rebalances
        )
        self.healthy = True

    async def report(self) -> None:
        """Have each agent report again and again."""
        sequence = 0
        while True:
            sequence += 1
            for process in list(self.cluster.processes.values()):
                report = Report(
                    process.device_id, process.slug, process.epoch, process.instance, sequence,
                    ready=True, state=AgentState.OK if self.healthy else AgentState.SUSPECT,
                    was_ready=True, misses=0, confirmed=False, reason="", listen="", version="1",
                )  # fmt: skip
                await self.served_api.fleet.reports.receive(report)
            await asyncio.sleep(0.1)

    def all_watched(self) -> bool:
        """Whether every agent may be moved."""
        fleet = self.served_api.fleet
        return len(fleet.records) == DEVICES and all(
            fleet.verdicts.last(slug)[0].state is VerdictState.WATCHED
            and fleet.agents.has_ready_agent(slug)
            for slug in fleet.records
        )

    async def watched(self) -> None:
        """Wait until the devices are healthy."""
        self.healthy = True
        async with asyncio.timeout(20.0):
            while not self.all_watched():
                await asyncio.sleep(0.02)

    def counts(self) -> dict[str, int]:
        return dict(Counter(process.node for process in self.cluster.processes.values()))

    async def post(self, path: str, **body: object) -> tuple[int, Any]:
        return await self.served_api.ask("POST", path, json=body)

    async def shown(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.served_api.ask("GET", "/v1/rebalance"))[1]
        return found

    async def balanced_after(self, *, dry_run: int) -> None:
        """Wait until a dry run would move this number of devices."""
        async with asyncio.timeout(20.0):
            while (await self.post("/v1/rebalance", dry_run=True))[1].get("to_move") != dry_run:
                await asyncio.sleep(0.05)


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    async with served(tmp_path) as served_api:
        one = Plane(served_api)
        devices = [
            Device(DeviceId(f"d{n}"), "default", "127.0.0.1", {"part": "ab"[n % 2]})
            for n in range(DEVICES)
        ]
        await served_api.fleet.records.register(devices)
        running = [asyncio.ensure_future(call) for call in (one.reconciler.run(), one.report())]
        try:
            await one.watched()
            one.cluster.nodes["n2"] = True
            await one.balanced_after(dry_run=4)
            yield one
        finally:
            for task in running:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def test_a_dry_run_reports_what_would_move_and_moves_nothing(plane: Plane) -> None:
    """Agents per host before and after, and the devices; a maximum and a target limit them. Nothing is stored."""
    status, answer = await plane.post("/v1/rebalance", dry_run=True, max=3, labels={"part": "a"})
    assert (status, answer["to_move"], answer["balanced"]) == (200, 3, False)
    assert answer["hosts"] == [
        {"host": "n1", "agents": 8, "after": 5},
        {"host": "n2", "agents": 0, "after": 3},
    ]
    assert {one["from"] for one in answer["moves"]} == {"n1"}
    assert {one["device"] for one in answer["moves"]} <= {"d0", "d2", "d4", "d6"}
    assert (await plane.shown())["items"] == []
    assert (await plane.served_api.fleet.registry.document("rebalance")).index == 0
    status, answer = await plane.post("/v1/rebalance", **{"class": "camera"})
    assert (status, "unknown agent class 'camera'" in json.dumps(answer)) == (400, True)
    for word in ("pause", "resume", "abort"):
        assert (await plane.post(f"/v1/rebalance:{word}"))[0] == 404


async def test_it_is_paused_resumed_and_ends_balanced(plane: Plane) -> None:
    """Each verb has its state and event and is refused where it does not apply. In the end both hosts have half of the
    agents, and the status has nothing to report any more."""
    plane.healthy = False
    await plane.balanced_after(dry_run=0)
    assert (await plane.post("/v1/rebalance"))[0] == 201
    assert (await plane.post("/v1/rebalance"))[0] == 409
    assert (await plane.post("/v1/rebalance:resume"))[0] == 409
    assert (await plane.post("/v1/rebalance:pause"))[1]["state"] == "paused"
    plane.healthy = True
    assert plane.served_api.fleet.views.status()["rebalance"] == {
        "state": "paused", "moved": 0, "on_way": 0, "waiting": 0,
    }  # fmt: skip
    assert (await plane.post("/v1/rebalance:resume"))[1]["state"] == "running"
    async with asyncio.timeout(30.0):
        while (await plane.shown())["items"][0]["state"] != "done":
            await asyncio.sleep(0.05)
    found = await plane.shown()
    assert plane.counts() == {"n1": 4, "n2": 4}
    assert (found["items"][0]["moved"], found["spread"], found["allowed"]) == (4, 0, 1)
    assert "rebalance" not in plane.served_api.fleet.views.status()
    kinds = [event.kind for event in plane.served_api.fleet.events.own.recent()]
    assert [kind for kind in kinds if kind.startswith("rebalance.")] == [
        "rebalance.started", "rebalance.paused", "rebalance.resumed", "rebalance.done",
    ]  # fmt: skip
    assert plane.served_api.metrics.render().count(b"nomad_watchdog_rebalance_devices{") == 3


@pytest.mark.slow_because("waits for two rebalances")
async def test_the_command_line_shows_the_same(
    plane: Plane, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rebalance` and its verbs print tables and JSON, and exit with the code of the error. Waiting for one that is
    aborted is a conflict."""

    async def verb(*words: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(
            _code, ["--address", plane.served_api.base, "rebalance", *words]
        )
        out = capsys.readouterr()
        return code, out.out, out.err

    code, out, _ = await verb("status")
    assert (code, out.splitlines()[0]) == (0, "no rebalance")
    code, out, _ = await verb("--dry-run")
    assert (code, out.splitlines()[0]) == (0, "4 devices would move")
    assert out.splitlines()[1].split() == ["HOST", "AGENTS", "AFTER"]
    assert out.splitlines()[3].split() == ["n2", "0", "4"]
    plane.healthy = False
    await plane.balanced_after(dry_run=0)
    waiting = asyncio.create_task(verb("--selector", "part=a", "--wait"))
    async with asyncio.timeout(20.0):
        while not (await plane.shown())["items"]:
            await asyncio.sleep(0.05)
    code, out, _ = await verb("abort")
    assert (code, "rebalance: aborted" in out) == (0, True)
    assert (await waiting)[0] == 75
    assert (await verb("--max", "2", "abort"))[0] == 64
    assert (await verb("abort"))[0] == 66
    await plane.watched()
    code, _, err = await verb("--max", "2", "--wait")
    assert code == 0
    assert "2 devices have been moved, the maximum; 2 hosts have 2 to 6 agents each" in err
    code, out, _ = await verb("status", "-o", "json")
    assert (code, json.loads(out)["items"][0]["max"]) == (0, 2)
    code, out, _ = await verb("-o", "json", "--wait")
    assert (code, json.loads(out)["to_move"]) == (0, 2)
    assert plane.counts() == {"n1": 4, "n2": 4}


def test_the_largest_document_fits_into_the_registry() -> None:
    """Names as long as they get: the marks of all devices that may be moved, the moves in progress and the hosts to
    avoid. More hosts are left out."""
    hosts = {f"{n:03}.{'x' * 249}": 100 for n in range(200)}
    name, host = "d" * 53, min(hosts)
    planned = plan_moves(hosts, {}, 0)
    avoid = _avoided(AgentsByHost(hosts), planned, 1)
    assert len(avoid) == 31
    ref = f"{'p' * 63}-{'c' * 63}-s255/dispatch-{name}-1700000000-01234567"
    going = {Slug(f"{n:02}{name[2:]}"): Going(ref, Epoch(10**6), host) for n in range(MAX_AT_ONCE)}
    marks = frozenset(mark(Slug(str(n))) for n in range(MAX_MOVED))
    now = Rebalance("r" * 12, WallTime(1.5e9), "m" * 128, going=going, moved=marks, avoid=avoid)
    assert len(marks) == MAX_MOVED
    assert len(FORMAT.encode(now)) <= MAX_DOCUMENT
    assert FORMAT.decode(FORMAT.encode(now)) == now


def test_the_document_is_read_as_it_was_written() -> None:
    """Every field survives, so a replica continues where another one has stopped."""
    slug = slug_of(DeviceId("d"))
    now = Rebalance(
        "r", WallTime(1.5), "me", Target(agent_class="c", labels={"a": "b"}), 7, RebalanceState.PAUSED,
        "why", {slug: Going("ref", Epoch(3), "n1")}, frozenset({mark(slug)}), ("n1", "n2"), 4, 3, 2, frozenset({"n3"}),
    )  # fmt: skip
    assert FORMAT.decode(FORMAT.encode(now)) == now
    assert FORMAT.decode(FORMAT.encode(None)) is None
