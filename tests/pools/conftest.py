"""A Nomad of this folder's own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from nomad_watchdog.dev.nomad import NomadServer


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nomad(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NomadServer]:
    async with NomadServer(tmp_path_factory.mktemp("nomad-pools")) as server:
        yield server
