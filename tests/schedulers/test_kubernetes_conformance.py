"""The scheduler contract on a real Kubernetes control plane, for each kind of workload."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from nomad_watchdog.testing.conformance import CHECKS, hostile_ids_map_back
from servers.kubelet.__main__ import Kubelet
from servers.kubernetes import KubernetesCluster
from tests.schedulers.conftest import CHECKS_BY_LENGTH, FEW
from tests.schedulers.kubernetes_rig import kubelet, make_rig

WORKLOADS = ["deployment", "statefulset", "pod"]
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.parametrize("workload", WORKLOADS),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def node(
    kube: KubernetesCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Kubelet]:
    for workload in WORKLOADS:
        await kube.add_namespace(f"conformance-{workload}")
    async with kubelet(kube, tmp_path_factory.mktemp("node"), node="node-1", subnet=21) as running:
        yield running


@pytest.mark.parametrize("name", CHECKS_BY_LENGTH)
async def test_kubernetes_keeps_the_contract(
    kube: KubernetesCluster, node: Kubelet, workload: str, name: str
) -> None:
    """Each check of the suite passes on a real API server, scheduler and controllers."""
    await CHECKS[name](make_rig(kube, f"conformance-{workload}", workload))


async def test_some_hostile_ids_map_back(
    kube: KubernetesCluster, node: Kubelet, workload: str
) -> None:
    """The slowest check of the suite, with fewer devices."""
    await hostile_ids_map_back(make_rig(kube, f"conformance-{workload}", workload), FEW)
