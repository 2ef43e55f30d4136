"""The PodDisruptionBudget of the agents, as jobs/kubernetes ships it, on real controllers."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.errors import TransientError
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler
from nomad_watchdog.testing.conformance import record_of
from servers.kubernetes import KubernetesCluster
from tests.schedulers.kubernetes.hosted import apply, is_ready, pods_of, until
from tests.schedulers.kubernetes.test_manifests import documents
from tests.schedulers.kubernetes_rig import kubelet, soon_ready, spec_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]
SPACE = "drains"


async def evict(client: KubernetesClient, pod: dict[str, Any]) -> bool:
    """Evict each pod as `kubectl drain` does; returns whether each eviction is granted."""
    name = pod["metadata"]["name"]
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": SPACE},
    }
    try:
        await client.create(f"/api/v1/namespaces/{SPACE}/pods/{name}/eviction", body)
    except TransientError as error:
        assert "disruption budget" in str(error)
        return False
    return True


async def bare_pods_leave_one_by_one(
    client: KubernetesClient,
    scheduler: KubernetesScheduler,
    spec: AgentSpec,
    pods: list[dict[str, Any]],
) -> None:
    """The budget is written by `prepare`, as after each resync, and not lowered for the pod that is gone."""
    path = f"/apis/policy/v1/namespaces/{SPACE}/poddisruptionbudgets/watchdog-pods"

    async def allowed() -> bool:
        status = (await client.get(path)).get("status") or {}
        return status.get("disruptionsAllowed") == 1 and status["expectedPods"] == 3

    await scheduler.snapshot()
    await scheduler.prepare([spec])
    assert (await client.get(path))["spec"]["minAvailable"] == 2
    await until(allowed, "the room of the bare pods' budget")
    assert [await evict(client, one) for one in pods] == [True, False, False]
    device = pods[0]["metadata"]["annotations"]["nomad-watchdog/device-id"]

    async def gone() -> bool:
        await scheduler.snapshot()
        await scheduler.prepare([spec])
        return (
            await client.find(f"/api/v1/namespaces/{SPACE}/pods/{pods[0]['metadata']['name']}")
            is None
        )

    await until(gone, "the evicted pod is gone")
    assert (await client.get(path))["spec"]["minAvailable"] == 2
    assert not await evict(client, pods[1])
    await scheduler.ensure(record_of(device), Epoch(2), spec)

    async def second() -> bool:
        return await evict(client, pods[1])

    await until(second, "the second bare pod's turn")


@pytest.mark.slow_because("starts six agents, and another for one that was evicted")
async def test_a_drain_moves_one_of_few_agents_at_a_time(
    kube: KubernetesCluster, admin: KubernetesClient, repository: Path, tmp_path: Path
) -> None:
    """Of three ready Deployments' agents, a second one is not evicted before the first has its
    successor. The same holds for bare pods, by the budget that the reconciler writes for them."""
    await kube.add_namespace(SPACE)
    budget = next(
        one
        for one in documents(repository / "jobs" / "kubernetes")
        if one["kind"] == "PodDisruptionBudget" and one["metadata"]["name"] == "watchdog-agents"
    )
    budget["metadata"]["namespace"] = SPACE
    await apply(admin, [budget])
    scheduler = KubernetesScheduler(
        settings=kube.settings(), namespace=SPACE, installation="drains"
    )
    async with kubelet(kube, tmp_path, node="drains", subnet=28):
        try:
            for workload in ("deployment", "pod"):
                spec = soon_ready(spec_of(variables={"workload": workload}), tmp_path)
                await scheduler.prepare([spec])
                for _ in range(3):
                    await scheduler.ensure(record_of(f"d-{uuid.uuid4()}"), Epoch(1), spec)

            async def ready() -> dict[str, list[dict[str, Any]]]:
                found = [
                    one for one in await pods_of(admin, SPACE, "watchdog-agent") if is_ready(one)
                ]
                kinds: dict[str, list[dict[str, Any]]] = {"deployment": [], "pod": []}
                for one in found:
                    kinds[one["metadata"]["labels"]["nomad-watchdog/workload"]].append(one)
                return kinds if len(found) == 6 else {}

            async def allowed() -> bool:
                path = f"/apis/policy/v1/namespaces/{SPACE}/poddisruptionbudgets/watchdog-agents"
                told = (await admin.get(path)).get("status") or {}
                return told.get("disruptionsAllowed") == 1 and told["expectedPods"] == 3

            kinds = await until(ready, "six ready agents")
            await until(allowed, "the budget's room")
            await bare_pods_leave_one_by_one(admin, scheduler, spec, kinds["pod"])
            assert [await evict(admin, one) for one in kinds["deployment"]] == [True, False, False]

            async def again() -> bool:
                return await evict(admin, kinds["deployment"][1])

            await until(again, "the second one's turn")
            before = {one["metadata"]["uid"] for one in kinds["deployment"]}
            agents = await pods_of(admin, SPACE, "watchdog-agent")
            successors = [one for one in agents if one["metadata"]["uid"] not in before]
            assert any(is_ready(one) for one in successors), "before the first one's was ready"
        finally:
            seen = await scheduler.snapshot()
            for placements in seen.placements.values():
                for one in placements:
                    await scheduler.retire(one, 1.0)
            await scheduler.close()
