"""The conformance suite, unchanged, over the local scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomad_watchdog.testing.conformance import CHECKS

from .conftest import local_rig


@pytest.mark.parametrize("name", list(CHECKS))
async def test_conformance(name: str, directory: Path) -> None:
    """The local scheduler keeps every promise of the interface."""
    async with local_rig(directory) as rig:
        await CHECKS[name](rig)
