"""The churn of test_churn_nomad on Kubernetes, with a node that is cut off in the middle.

As StatefulSets, so that «never two agents of one device» must hold at every moment, the lost node included.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.demo.fleet import SimulatedFleet
from nomad_watchdog.demo.stage import Stage, open_stage
from nomad_watchdog.dev.process import free_port

from . import audit
from .churn import SEED, Churn, Watch, play

pytestmark = [pytest.mark.servers, pytest.mark.long, pytest.mark.timeout(900)]

CUT_OFF_S = 20.0
"""Longer than a node may be silent (6 s) and than its pods tolerate that (10 s)."""
PODS = "/api/v1/namespaces/nomad-watchdog/pods"
SETS = "/apis/apps/v1/namespaces/nomad-watchdog/statefulsets"


class KubernetesChurn(Churn):
    async def drain(self) -> None:
        self.done.append("second node cut off")
        self.stage.nodes[1].pause()
        await asyncio.sleep(CUT_OFF_S)
        self.stage.nodes[1].resume()


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


async def test_promises_hold_on_kubernetes_after_churn_and_a_lost_node(
    tmp_path: Path, fleet: SimulatedFleet
) -> None:
    """Devices come, go, vanish, reboot and return, agents and the reconciler get kill -9, a node is cut off
    for longer than is tolerated: never two agents of one device at once, no false offline, and at the end
    exactly one agent a present device in the registry, Kubernetes, Consul and the process table."""
    async with (
        open_stage("kubernetes", tmp_path, fleet.port, clients=2, strategy="statefulset") as stage,
        client_of(stage) as client,
    ):
        churn = KubernetesChurn(stage, fleet, Watch(stage), random.Random(SEED))

        async def audited(present: AbstractSet[str]) -> list[str]:
            objects, pods = (await client.list(SETS)).items, (await client.list(PODS)).items
            return await audit.audit_pods(
                stage.root, stage.consul, objects, pods, present, churn.known
            )

        # a pod that its node has given up is followed by another one at the same epoch
        await play(churn, audited, devices=60, churn_s=60.0, instances=2)
        # The auditor itself: a device that should not be there is four broken promises.
        found = await audited(churn.present - {min(churn.present)})
        assert sorted(line.split(":")[0] for line in found) == ["L1", "L1", "L1", "S4"]
