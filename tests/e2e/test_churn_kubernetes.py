"""The churn of test_churn_nomad on Kubernetes, with a node that is cut off halfway.

Once as Deployments, the agents' default, and once as StatefulSets, where "never two agents of one
device" must hold at every moment, including while the node is lost.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.demo.stage import Stage, open_stage
from nomad_watchdog.schedulers.kubernetes import names
from tests.e2e import audit
from tests.e2e.churn import SEED, Churn, Watch, play

pytestmark = [pytest.mark.servers, pytest.mark.busy, pytest.mark.timeout(900)]

GIVEN_UP_S = 60.0
"""Far longer than a node may be silent (6 s) and than its pods tolerate that (10 s)."""
PODS = "/api/v1/namespaces/nomad-watchdog/pods"
OBJECTS = "/apis/apps/v1/namespaces/nomad-watchdog/{}s"
STOPS_WITHIN_S = 15.0
"""For this time after it is back a node may still run pods that were started elsewhere meanwhile:
it has to receive the deletions, and the pods have 10 s to end."""


@dataclass(slots=True, kw_only=True)
class KubernetesChurn(Churn):
    client: KubernetesClient
    workload: str

    async def drain(self) -> None:
        # the scheduler may have put all pods on one node
        pods = await self.pods()
        where = Counter(pod["spec"].get("nodeName") for pod in pods)
        lost = max(self.stage.nodes, key=lambda node: where[node.node])
        self.done.append(f"{lost.node} cut off, {where[lost.node]} pods")
        doubles = self.workload == "deployment"
        lost.pause()
        if doubles:
            self.watch.may_double = {
                pod["metadata"]["labels"][names.SLUG]
                for pod in pods
                if pod["spec"].get("nodeName") == lost.node
            }
            self.watch.may_double_until = math.inf
        async with asyncio.timeout(GIVEN_UP_S):
            while any(pod["spec"].get("nodeName") == lost.node for pod in await self.pods()):
                await asyncio.sleep(0.5)
        await asyncio.sleep(3.0)
        lost.resume()
        if doubles:
            self.watch.may_double_until = time.monotonic() + STOPS_WITHIN_S

    async def pods(self) -> list[Any]:
        """Pods that Kubernetes has not given up."""
        found = (await self.client.list(PODS)).items
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]


@asynccontextmanager
async def client_of(stage: Stage) -> AsyncIterator[KubernetesClient]:
    assert stage.cluster is not None
    client = stage.cluster.client()
    try:
        yield client
    finally:
        await client.close()


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    one = SimulatedFleet(network=8, port=free_port())
    yield one
    await one.close()


@pytest.mark.parametrize("workload", ["deployment", "statefulset"])
async def test_promises_hold_on_kubernetes_after_churn_and_a_lost_node(
    tmp_path: Path, fleet: SimulatedFleet, workload: str
) -> None:
    """Devices are added, removed, vanish, reboot and return, agents and the reconciler get kill -9,
    and a node is cut off for longer than its pods tolerate. A device never has two agents at once,
    except those that a Deployment starts by design while a node is lost. None is falsely offline,
    and at the end each present device has exactly one agent in the registry, Kubernetes, Consul and
    the process table."""
    async with (
        open_stage("kubernetes", tmp_path, fleet.port, clients=2, strategy=workload) as stage,
        client_of(stage) as client,
    ):
        churn = KubernetesChurn(
            stage, fleet, Watch(stage), random.Random(SEED), client=client, workload=workload
        )

        async def audited(present: AbstractSet[str]) -> list[str]:
            objects = (await client.list(OBJECTS.format(workload))).items
            pods = (await client.list(PODS)).items
            return await audit.audit_pods(
                stage.root, stage.consul, objects, pods, present, churn.known
            )

        # a pod that its node has given up is replaced at the same epoch
        await play(churn, audited, devices=30, churn_s=30.0, instances=2)
        # Check the audit itself: an unexpected device is four broken promises.
        found = await audited(churn.present - {min(churn.present)})
        assert sorted(line.split(":")[0] for line in found) == ["L1", "L1", "L1", "S4"]
