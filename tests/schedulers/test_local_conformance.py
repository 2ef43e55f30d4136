"""The conformance suite, unchanged, over the local scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomad_watchdog.testing.conformance import CHECKS, hostile_ids_map_back
from tests.schedulers.conftest import CHECKS_BY_LENGTH, FEW, local_rig

WAYS = pytest.mark.parametrize("fork", [None, True, False], ids=["command", "forked", "spawned"])


@WAYS
@pytest.mark.parametrize("name", CHECKS_BY_LENGTH)
async def test_conformance(name: str, fork: bool | None, directory: Path) -> None:
    """The local scheduler passes every check of the interface, with an operator's command and with
    our agent, forked or spawned."""
    async with local_rig(directory, fork=fork) as rig:
        await CHECKS[name](rig)


@WAYS
async def test_some_hostile_ids_map_back(fork: bool | None, directory: Path) -> None:
    """The slowest check of the suite, with fewer devices: fewest where each agent is an interpreter
    of its own, because those take CPU from all other tests."""
    async with local_rig(directory, fork=fork) as rig:
        await hostile_ids_map_back(rig, FEW // 2 if fork is False else FEW)
