"""Fixtures of the controllers' tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nomad_watchdog.registry.sqlite import SqliteRegistry


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[SqliteRegistry]:
    """An empty registry in a file."""
    found = SqliteRegistry(path=tmp_path / "registry.db")
    await found.initialise()
    yield found
    await found.close()
