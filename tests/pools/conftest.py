"""Servers for the tests of pools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from servers.nats import NatsServer
from tests.pools import work


@pytest_asyncio.fixture
async def queue(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A NATS server with an empty work queue."""
    async with NatsServer(tmp_path / "nats") as server:
        await work.make(server)
        yield server
