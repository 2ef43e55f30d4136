"""Drains of a node with real agents: `nomad node drain` with its default deadline of one hour, on a real Nomad with
three clients, and what `kubectl drain` does, on a real API server with its controllers and three nodes."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
import pytest_asyncio

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.core.node_drain import NO_OTHER
from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.demo.stage import Stage, StagePace, open_stage
from nomad_watchdog.errors import TransientError
from tests.e2e import audit
from tests.schedulers.conftest import eventually
from tests.schedulers.kubernetes.test_manifests import documents

pytestmark = [pytest.mark.servers]

HOUR: Final = {"Deadline": 3600 * 10**9, "IgnoreSystemJobs": True}
GRACEFUL: Final = ("0", "130", "143")
"""Exit codes of an agent that retires, and of one that shuts down after SIGINT (from Nomad) or SIGTERM."""
KILL_TIMEOUT_S: Final = 5.0
"""As in the configuration of the demo."""
_SAMPLE_S: Final = 0.1
NOT_READY: Final = ("starting", "unwatched", "failing")
"""Verdicts of a device without a ready agent."""
PATIENT: Final = StagePace(interval="3s", timeout="2s", beat="2s", resync="5s")
"""A machine that is busy with starts answers probes late: that must not look like a device that is offline."""


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    one = SimulatedFleet(network=9, port=free_port())
    yield one
    await one.close()


@dataclass
class Samples:
    """What the API showed, again and again."""

    stage: Stage
    counts: list[int] = field(default_factory=list)
    """Number of devices without a ready agent."""
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            await self.take()
            await asyncio.sleep(_SAMPLE_S)

    async def take(self) -> int:
        items = await self.stage.items()
        self.counts.append(sum(one["verdict"] in NOT_READY for one in items))
        self.wrong += [f"{one['id']} is offline" for one in items if one["verdict"] == "offline"]
        self.wrong += [f"two agents: {one}" for one in audit.doubled(self.stage.root)]
        return self.counts[-1]


@dataclass
class Site:
    """Devices whose agents all run on one of three Nomad clients."""

    stage: Stage
    nodes: dict[str, str]
    """Name of each client → its id."""
    node: str
    """The id of the one with the agents."""

    async def nomad(self, method: str, path: str, body: object = None) -> Any:
        async with self.stage.session.request(method, self.stage.nomad + path, json=body) as answer:
            answer.raise_for_status()
            return await answer.json(content_type=None)

    async def eligible(self, node: str, *, is_eligible: bool) -> None:
        body = {"Eligibility": "eligible" if is_eligible else "ineligible"}
        await self.nomad("POST", f"/v1/node/{node}/eligibility", body)

    async def watched(self, count: int) -> bool:
        items = await self.stage.items()
        return sum(one["verdict"] == "watched" for one in items) == count

    async def forced(self) -> list[str]:
        """The agents on the node that did not shut down after the signal, and how they ended."""
        found = []
        for one in await self.nomad("GET", f"/v1/node/{self.node}/allocations"):
            events = {event["Type"]: event for event in one["TaskStates"]["agent"]["Events"]}
            ended, told = events["Terminated"], events.get("Killing")
            code = ended["Details"].get("exit_code")
            # An agent whose report is refused, because its successor's epoch is in force, retires before the signal.
            took_s = (ended["Time"] - told["Time"]) / 1e9 if told else 0.0
            if code not in GRACEFUL or took_s > KILL_TIMEOUT_S:
                found.append(f"{one['JobID']}: {ended['Details']} after {took_s:.1f} s")
        return found

    async def moved_by_nomad(self) -> list[str]:
        rows: Iterable[dict[str, Any]] = await self.nomad("GET", "/v1/allocations")
        return [one["ID"] for one in rows if (one["DesiredTransition"] or {}).get("Migrate")]


@asynccontextmanager
async def site(root: Path, fleet: SimulatedFleet, count: int, at_once: int) -> AsyncIterator[Site]:
    """All agents are ready, on one client. `at_once`: the window."""
    async with open_stage("nomad", root, fleet.port, clients=3, pace=PATIENT) as stage:
        # Nor must a late report look like an agent that is gone; one that is replaced counts at once all the same.
        text = stage.config.read_text().replace('report_stale  = "10s"', 'report_stale  = "60s"')
        block = f"rollout {{\n  at_once  = {at_once}\n  fraction = 0\n}}\n"
        stage.config.write_text(text + block)
        await stage.call("POST", "/v1/config:reload")
        made = Site(stage, {}, "")
        made.nodes = {one["Name"]: one["ID"] for one in await made.nomad("GET", "/v1/nodes")}
        made.node, *others = sorted(made.nodes.values())
        for other in others:
            await made.eligible(other, is_eligible=False)
        for number in range(count):
            await fleet.add(f"d{number}")
        await stage.register({name: one.address for name, one in fleet.devices.items()})
        await eventually(lambda: made.watched(count), 60.0 + 3.0 * count)
        for other in others:
            await made.eligible(other, is_eligible=True)
        yield made


async def drained(made: Site, count: int, at_once: int) -> None:
    """Drain the node and check what happens until all agents are ready elsewhere. Prints the figures."""
    samples = Samples(made.stage)
    began = time.monotonic()
    await made.nomad("POST", f"/v1/node/{made.node}/drain", {"DrainSpec": HOUR})
    sampling = asyncio.ensure_future(samples.run())

    async def empty() -> bool:
        left = await made.nomad("GET", f"/v1/node/{made.node}/allocations")
        return all(one["ClientStatus"] in ("complete", "failed") for one in left)

    async def complete() -> bool:
        return (await made.nomad("GET", f"/v1/node/{made.node}"))["DrainStrategy"] is None

    try:
        await eventually(empty, 60.0 + 5.0 * count)
        empty_s = time.monotonic() - began
        await eventually(lambda: made.watched(count), 60.0)
        took_s = time.monotonic() - began
        await eventually(complete)
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
    print(
        f"\n{count} agents, {at_once} at a time: node empty after {empty_s:.1f} s, all ready elsewhere after "
        f"{took_s:.1f} s; without a ready agent at most {max(samples.counts)}, median "
        f"{statistics.median(samples.counts):g}, of {len(samples.counts)} samples"
    )
    assert not samples.wrong
    assert max(samples.counts) <= at_once
    assert await made.forced() == []
    assert await made.moved_by_nomad() == []
    assert empty_s < 300.0
    page = await made.stage.call("GET", "/v1/events?kind=verdict.offline")
    assert not page["items"]
    items = await made.stage.items()
    assert {one["epoch"] for one in items} == {2}
    found = await made.stage.call("GET", f"/v1/devices/{quote('d0')}/explain")
    assert "drain" not in found["next"]


@pytest.mark.timeout(400)
@pytest.mark.slow_because("starts three Nomad clients, and moves eight agents two at a time")
async def test_a_drained_node_is_empty_long_before_the_deadline(
    tmp_path: Path, fleet: SimulatedFleet
) -> None:
    """The agents move within the window and end gracefully; no device is ever offline."""
    async with site(tmp_path, fleet, 8, 2) as made:
        await drained(made, 8, 2)


@pytest.mark.busy
@pytest.mark.timeout(1800)
async def test_a_node_with_a_hundred_agents_is_empty_within_minutes(
    tmp_path: Path, fleet: SimulatedFleet
) -> None:
    """As above, with the default window: a tenth of the fleet."""
    async with site(tmp_path, fleet, 100, 10) as made:
        await drained(made, 100, 10)


PODS: Final = "/api/v1/namespaces/nomad-watchdog/pods"
BUDGETS: Final = "/apis/policy/v1/namespaces/nomad-watchdog/poddisruptionbudgets"


async def cordon(client: KubernetesClient, node: str, *, on: bool) -> None:
    body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}}
    body |= {"spec": {"unschedulable": on}}
    await client.apply(f"/api/v1/nodes/{node}", body, manager="kubectl", force=True)


async def evicted(client: KubernetesClient, node: str) -> int:
    """Evict each pod of a node until none is left, as `kubectl drain` does after the cordon; how often the API server
    refused."""
    refused = 0
    while pods := (await client.list(PODS, fields=f"spec.nodeName={node}")).items:
        for pod in pods:
            if "deletionTimestamp" in pod["metadata"]:
                continue
            meta = {key: pod["metadata"][key] for key in ("name", "namespace")}
            body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
            try:
                await client.create(f"{PODS}/{meta['name']}/eviction", body)
            except TransientError as error:
                assert "disruption budget" in str(error)
                refused += 1
        await asyncio.sleep(0.5)
    return refused


@dataclass
class Cluster:
    """Devices whose agents all run on one of three nodes; the other two are cordoned."""

    stage: Stage
    client: KubernetesClient
    count: int
    node: str
    others: list[str]

    async def all_watched(self) -> bool:
        items = await self.stage.items()
        return sum(one["verdict"] == "watched" for one in items) == self.count

    async def pods(self) -> int:
        """Number of pods on the node."""
        return len((await self.client.list(PODS, fields=f"spec.nodeName={self.node}")).items)

    async def leave_cordoned(self, at_once: int) -> list[str]:
        """Have agents leave cordoned nodes from now on; the settings that changed."""
        text = self.stage.config.read_text()
        text = text.replace('report_stale  = "10s"', 'report_stale  = "60s"')
        text = text.replace("\nkubernetes {\n", "\nkubernetes {\n  leave_cordoned = true\n")
        block = f"rollout {{\n  at_once  = {at_once}\n  fraction = 0\n}}\n"
        self.stage.config.write_text(text + block)
        changed: list[str] = (await self.stage.call("POST", "/v1/config:reload"))["changed"]
        return changed

    async def open_others(self) -> None:
        for other in self.others:
            await cordon(self.client, other, on=False)


@asynccontextmanager
async def cluster(
    root: Path,
    repository: Path,
    fleet: SimulatedFleet,
    workload: str,
    count: int,
    unavailable: int | None = None,
) -> AsyncIterator[Cluster]:
    """All agents are ready, and the shipped budget is installed. `unavailable`: another `maxUnavailable` for it."""
    async with open_stage(
        "kubernetes", root, fleet.port, strategy=workload, clients=3, pace=PATIENT
    ) as stage:
        assert stage.cluster is not None
        client = stage.cluster.client()
        try:
            for one in documents(repository / "jobs" / "kubernetes"):
                if (one["kind"], one["metadata"]["name"]) == (
                    "PodDisruptionBudget",
                    "watchdog-agents",
                ):
                    if unavailable is not None:
                        one["spec"]["maxUnavailable"] = unavailable
                    await client.apply(f"{BUDGETS}/watchdog-agents", one)
            node, *others = (one.node for one in stage.nodes)
            for other in others:
                await cordon(client, other, on=True)
            for number in range(count):
                await fleet.add(f"d{number}")
            await stage.register({name: one.address for name, one in fleet.devices.items()})
            made = Cluster(stage, client, count, node, others)
            await eventually(made.all_watched, 120.0)
            yield made
        finally:
            await client.close()


@pytest.mark.busy
@pytest.mark.timeout(600)
@pytest.mark.slow_because(
    "starts a Kubernetes with three nodes, and moves ten agents one at a time"
)
@pytest.mark.parametrize("workload", ["deployment", "statefulset", "pod"])
async def test_kubectl_drain_evicts_a_tenth_at_a_time(
    tmp_path: Path, repository: Path, fleet: SimulatedFleet, workload: str
) -> None:
    """For each workload, evictions are refused while the budget has no room; no device is ever offline, and all agents
    are ready on other nodes in the end."""
    count, budget = 10, "watchdog-pods" if workload == "pod" else "watchdog-agents"
    async with cluster(tmp_path, repository, fleet, workload, count) as made:

        async def has_room() -> bool:
            found = await made.client.find(f"{BUDGETS}/{budget}")
            status = (found or {}).get("status") or {}
            return status.get("disruptionsAllowed") == 1 and status["expectedPods"] == count

        await eventually(has_room, 60.0)
        await made.open_others()
        samples = Samples(made.stage)
        sampling = asyncio.ensure_future(samples.run())
        began = time.monotonic()
        try:
            await cordon(made.client, made.node, on=True)
            refused = await asyncio.wait_for(evicted(made.client, made.node), 300.0)
            empty_s = time.monotonic() - began
            await eventually(made.all_watched, 60.0)
            took_s = time.monotonic() - began
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
        print(
            f"\n{count} agents as {workload}, one at a time: node empty after {empty_s:.1f} s, all ready elsewhere "
            f"after {took_s:.1f} s; {refused} evictions refused; without a ready agent at most "
            f"{max(samples.counts)}, median {statistics.median(samples.counts):g}, of {len(samples.counts)} samples"
        )
        assert refused
        assert not [one for one in samples.wrong if "offline" in one]
        # The budget counts pods, and a pod is ready a moment before the API has its first report.
        assert max(samples.counts) <= 2


@pytest.mark.busy
@pytest.mark.timeout(600)
@pytest.mark.slow_because(
    "starts a Kubernetes with three nodes, and moves six agents two at a time"
)
@pytest.mark.parametrize("workload", ["deployment", "statefulset", "pod"])
async def test_agents_leave_a_cordoned_node_within_the_window(
    tmp_path: Path, repository: Path, fleet: SimulatedFleet, workload: str
) -> None:
    """With `leave_cordoned`, which a reload applies, nothing moves while all nodes are cordoned. Then the agents move
    within the window, that of the device that is offline last, and `kubectl drain` has nothing to evict."""
    count, at_once = 6, 2
    async with cluster(tmp_path, repository, fleet, workload, count) as made:
        stage, where = made.stage, f"node {made.node} is cordoned"
        await cordon(made.client, made.node, on=True)
        await fleet.devices["d0"].power_off()

        async def is_offline() -> bool:
            items = await stage.items()
            return [one["id"] for one in items if one["verdict"] == "offline"] == ["d0"]

        await eventually(is_offline, 60.0)
        closed = (await stage.call("GET", "/v1/status"))["closed_nodes"]
        assert all("waits" not in one for one in closed), "agents stay by default"
        assert "kubernetes.leave_cordoned false → true" in await made.leave_cordoned(at_once)

        async def waits() -> bool:
            found = (await stage.call("GET", "/v1/status"))["closed_nodes"]
            return [one.get("waits") for one in found if one["agents"]] == [NO_OTHER]

        await eventually(waits, 60.0)
        assert {one["epoch"] for one in await stage.items()} == {1}
        samples = Samples(stage)
        sampling = asyncio.ensure_future(samples.run())
        began = time.monotonic()
        try:
            await made.open_others()

            async def is_empty() -> bool:
                return not await made.pods()

            await eventually(is_empty, 240.0)
            empty_s = time.monotonic() - began
            assert await evicted(made.client, made.node) == 0
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
        print(
            f"\n{count} agents as {workload}, {at_once} at a time: cordoned node empty after {empty_s:.1f} s; without a "
            f"ready agent at most {max(samples.counts)}, of {len(samples.counts)} samples"
        )
        assert not [one for one in samples.wrong if "offline" in one and "d0" not in one]
        assert max(samples.counts) <= at_once
        found = (await stage.call("GET", "/v1/events?kind=plan.replace&limit=100"))["items"]
        assert all(where in one["text"] for one in found)
        assert [one["device"] for one in found].index("d0") == count - 1
        assert len(found) == count


@pytest.mark.busy
@pytest.mark.timeout(600)
@pytest.mark.slow_because(
    "starts a Kubernetes with three nodes, and moves six agents two at a time"
)
@pytest.mark.parametrize("workload", ["deployment", "statefulset", "pod"])
async def test_kubectl_drain_waits_for_the_moves_if_the_budget_permits_none(
    tmp_path: Path, repository: Path, fleet: SimulatedFleet, workload: str
) -> None:
    """With `leave_cordoned` and a budget of 0 a drain that does not wait for the moves evicts no agent: each eviction is
    refused until the agent has left, and the window holds. For bare pods the control plane writes that budget."""
    count, at_once = 6, 2
    budget = "watchdog-pods" if workload == "pod" else "watchdog-agents"
    async with cluster(tmp_path, repository, fleet, workload, count, unavailable=0) as made:
        await made.leave_cordoned(at_once)
        assert made.stage.reconciler is not None
        await made.stage.reconciler.terminate(10.0)  # the budget of bare pods is as of the start
        await made.stage.start_reconciler()

        async def are_healthy() -> bool:
            status = (await made.client.get(f"{BUDGETS}/{budget}")).get("status") or {}
            return (status.get("currentHealthy"), status["disruptionsAllowed"]) == (count, 0)

        await eventually(are_healthy, 60.0)
        await made.open_others()
        samples = Samples(made.stage)
        sampling = asyncio.ensure_future(samples.run())
        try:
            await cordon(made.client, made.node, on=True)
            refused = await asyncio.wait_for(evicted(made.client, made.node), 240.0)
            await eventually(made.all_watched, 60.0)
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
        assert refused
        assert not [one for one in samples.wrong if "offline" in one]
        assert max(samples.counts) <= at_once
        found = await made.stage.call("GET", "/v1/events?kind=plan.replace&limit=100")
        assert len(found["items"]) == count
