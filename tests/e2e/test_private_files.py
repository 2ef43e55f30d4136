"""The permissions of the files that the program writes, whatever the umask of its caller."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from pathlib import Path

import pytest

from tests.attacks.table import Attack
from tests.e2e.test_program import Program
from tests.schedulers.conftest import directory, eventually, pids_of

__all__ = ["directory"]


@pytest.mark.slow_because("it starts the program and an agent")
@pytest.mark.attack("H14", "files and folders of the service, under umask 000")
async def test_h14_nobody_else_can_read_what_the_service_writes(
    tmp_path: Path, directory: Path, attack: Attack
) -> None:
    """Registry, its WAL, events, lease, agent, its state, lock and log are 0600 and every folder is
    0700."""
    program = Program(tmp_path)
    data = directory.parent / "made"
    text = program.file.read_text().replace(f'data_dir = "{tmp_path}"', f'data_dir = "{data}"')
    program.file.write_text(f'{text}\nlocal {{\n  directory = "{directory}"\n}}\n')
    before = os.umask(0)
    try:
        async with program.running() as service:
            await program.ask("PUT", "/v1/devices/a", {"address": "127.0.0.1"})
            await eventually(lambda: bool(pids_of(directory)), 60.0)
            await eventually(lambda: bool(list(directory.glob("*/agent.log"))), 60.0)
            found = {
                path: path.stat().st_mode for root in (data, directory) for path in root.rglob("*")
            }
            found[data] = data.stat().st_mode
            service.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(service.wait(), 60.0) == 0
    finally:
        os.umask(before)
    names = {path.name for path in found}
    assert {"watchdog-agent.pyz", "agent.log", "config.json", "lock"} <= names
    assert any(name.endswith("-wal") for name in names)
    wrong = {
        str(path): oct(mode)
        for path, mode in found.items()
        if stat.S_IMODE(mode) != (0o700 if stat.S_ISDIR(mode) else 0o600)
    }
    assert wrong == {}
    attack.tried = len(found)
    attack.result = f"all of {len(found)} files and folders are 0600 or 0700"
