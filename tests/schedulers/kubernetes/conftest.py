"""Fixtures shared by several of these files."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.process import free_port
from servers.kubernetes import KubernetesCluster


@pytest_asyncio.fixture(loop_scope="session")
async def admin(kube: KubernetesCluster) -> AsyncIterator[KubernetesClient]:
    """A client with all permissions."""
    it = kube.client()
    yield it
    await it.close()


@pytest_asyncio.fixture(loop_scope="session")
async def fleet() -> AsyncIterator[SimulatedFleet]:
    """Devices that answer HTTP."""
    it = SimulatedFleet(network=12, port=free_port())
    yield it
    await it.close()
