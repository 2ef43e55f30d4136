"""The churn of test_churn_nomad on Kubernetes, with a node that is cut off in the middle.

As StatefulSets, so that «never two agents of one device» must hold at every moment, the lost node included.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from nomad_watchdog.demo.fleet import SimulatedFleet
from nomad_watchdog.demo.stage import Stage, open_stage
from nomad_watchdog.dev.process import free_port

from . import audit
from .test_churn_nomad import Churn, Watch, explain, settled

pytestmark = [pytest.mark.servers, pytest.mark.long, pytest.mark.timeout(900)]

DEVICES = 60
CHURN_S = 60.0
COME_UP_S = 180.0
SETTLE_S = 120.0
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


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    one = SimulatedFleet(network=8, port=free_port())
    yield one
    await one.close()


async def audited(stage: Stage, churn: Churn) -> list[str]:
    """The audit, again for a while: Consul asks each agent only every 10 s."""
    assert stage.cluster is not None
    client = stage.cluster.client()
    deadline = time.monotonic() + 60.0
    try:
        while True:
            objects = (await client.list(SETS)).items
            pods = (await client.list(PODS)).items
            wrong = await audit.audit_pods(
                stage.root, stage.consul, objects, pods, churn.present, churn.known
            )
            if not wrong or time.monotonic() > deadline:
                return wrong
            await asyncio.sleep(2.0)
    finally:
        await client.close()


async def test_promises_hold_on_kubernetes_after_churn_and_a_lost_node(
    tmp_path: Path, fleet: SimulatedFleet
) -> None:
    """Devices come, go, vanish, reboot and return, agents and the reconciler get kill -9, a node is cut off
    for longer than is tolerated: never two agents of one device at once, no false offline, and at the end
    exactly one agent a present device in the registry, Kubernetes, Consul and the process table."""
    seed = int(os.environ.get("WATCHDOG_SEED", "20251"))
    async with open_stage(
        "kubernetes", tmp_path, fleet.port, clients=2, strategy="statefulset"
    ) as stage:
        watch = Watch(stage)
        churn = KubernetesChurn(stage, fleet, watch, random.Random(seed))
        await churn.add(*(f"device-{n:03}" for n in range(DEVICES)))
        watching = asyncio.ensure_future(watch.run())
        try:
            late = await settled(stage, churn, COME_UP_S)
            assert late == [], late[:5]
            await churn.run(CHURN_S)
            late = await settled(stage, churn, SETTLE_S)
            explained = [await explain(stage, line) for line in late[:3]]
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        wrong = late + watch.wrong
        wrong += [
            f"S1: {name} had {len(instances)} accepted instances at epoch {epoch}"
            for (name, epoch), instances in watch.accepted.items()
            # a pod that its node has given up is followed by another one at the same epoch
            if len(instances) > 2
        ]
        wrong += await audited(stage, churn)

        assert wrong == [], (seed, churn.done, wrong[:20], explained)
        assert watch.looks > CHURN_S / 4
        # The auditor itself: a device that should not be there is four broken promises.
        name = min(churn.present)
        churn.present.discard(name)
        assert stage.cluster is not None
        client = stage.cluster.client()
        try:
            found = await audit.audit_pods(
                stage.root, stage.consul, (await client.list(SETS)).items,
                (await client.list(PODS)).items, churn.present, churn.known,
            )  # fmt: skip
        finally:
            await client.close()
        assert sorted(line.split(":")[0] for line in found) == ["L1", "L1", "L1", "S4"]
