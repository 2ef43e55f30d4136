"""The same store opened any number of times: in SQLite, in real Consul, and in the fake of both."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.registry import Registry
from nomad_watchdog.registry.consul import ConsulRegistry
from nomad_watchdog.registry.sqlite import SqliteRegistry
from servers.consul import ConsulServer
from tests.simulation import fakes

FAKE = "memory"


class Store:
    """The store of one test."""

    def __init__(self, folder: Path, address: str) -> None:
        self.path = folder / "registry.sqlite"
        self.address = address
        self.prefix = f"test-{uuid.uuid4()}"
        self.memory = fakes.Store()
        self._opened: list[Registry] = []
        self._clients: list[ConsulClient] = []

    def open(self) -> Registry:
        """Another handle to the same store, like that of another process."""
        registry: Registry
        if not self.address:
            registry = SqliteRegistry(path=self.path)
        elif self.address == FAKE:
            registry = fakes.FakeRegistry(self.memory)
        else:
            client = ConsulClient(ConsulAccess(address=self.address))
            self._clients.append(client)
            registry = ConsulRegistry(client=client, prefix=self.prefix)
        self._opened.append(registry)
        return registry

    async def close(self) -> None:
        for registry in self._opened:
            await registry.close()
        for client in self._clients:
            await client.close()


@pytest.fixture(params=["sqlite", "consul", "fake"])
def store_address(request: pytest.FixtureRequest) -> str:
    """Empty = SQLite. Not async, so that only tests over Consul start a Consul."""
    if request.param == "sqlite":
        return ""
    if request.param == "fake":
        return FAKE
    server: ConsulServer = request.getfixturevalue("consul")
    return server.http_addr


@pytest_asyncio.fixture
async def store(store_address: str, tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store(tmp_path, store_address)
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def registry(store: Store) -> Registry:
    """An initialised store."""
    opened = store.open()
    await opened.initialise()
    return opened
