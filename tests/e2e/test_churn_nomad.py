"""200 devices on a real Nomad with two clients, two minutes of churn, then an audit.

Out of scope here: partitions and server crashes, which need more than one server.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest
import pytest_asyncio

from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.demo.stage import open_stage
from tests.e2e import audit
from tests.e2e.churn import SEED, Churn, Watch, play

pytestmark = [pytest.mark.servers, pytest.mark.busy, pytest.mark.timeout(900)]


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    one = SimulatedFleet(network=7, port=free_port())
    yield one
    await one.close()


async def test_promises_hold_after_two_minutes_of_churn(
    tmp_path: Path, fleet: SimulatedFleet
) -> None:
    """Devices are added, removed, vanish, reboot and return, agents and the reconciler get kill -9,
    and a node is drained. A device never has two agents at once, none is falsely offline, and at
    the end each present device has exactly one agent in the registry, Nomad, Consul and the process
    table."""
    async with open_stage("nomad", tmp_path, fleet.port, clients=2) as stage:
        churn = Churn(stage, fleet, Watch(stage), random.Random(SEED))

        async def audited(present: AbstractSet[str]) -> list[str]:
            return await audit.audit(stage.root, stage.consul, stage.nomad, present, churn.known)

        await play(churn, audited, devices=200, churn_s=120.0, instances=1)
        # Check the audit itself: an unexpected device is three broken promises.
        found = await audited(churn.present - {min(churn.present)})
        assert sorted(line.split(":")[0] for line in found) == ["L1", "L1", "S4"]
