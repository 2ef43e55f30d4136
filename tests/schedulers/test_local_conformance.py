"""The conformance suite, unchanged, over the local scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomad_watchdog.testing.conformance import CHECKS, hostile_ids_map_back

from .conftest import local_rig


@pytest.mark.parametrize("name", [one for one in CHECKS if one != "hostile_ids_map_back"])
async def test_conformance(name: str, directory: Path) -> None:
    """The local scheduler keeps every promise of the interface."""
    async with local_rig(directory) as rig:
        await CHECKS[name](rig)


async def test_conformance_hostile_ids(directory: Path) -> None:
    """A hundred hostile ids are placed and mapped back exactly."""
    async with local_rig(directory) as rig:
        await hostile_ids_map_back(rig, 100)
