"""The conformance suite, unchanged, over the local scheduler."""

from __future__ import annotations

from pathlib import Path

import pytest

from nomad_watchdog.testing.conformance import CHECKS

from .conftest import local_rig


@pytest.mark.parametrize("fork", [None, True, False], ids=["command", "forked", "spawned"])
@pytest.mark.parametrize("name", list(CHECKS))
async def test_conformance(name: str, fork: bool | None, directory: Path) -> None:
    """The local scheduler keeps every promise of the interface, with an operator's command and with our
    agent, forked or spawned."""
    async with local_rig(directory, fork=fork) as rig:
        await CHECKS[name](rig)
