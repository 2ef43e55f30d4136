"""A version that starts well and fails late, from the operator's view: the program, and its
agents."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.agent.world import OK, Listener, says
from tests.e2e.test_program import Program, directory
from tests.schedulers.conftest import eventually, pids_of

__all__ = ["directory"]

CONFIG = """\
data_dir = "{root}"
api {{ listen = "127.0.0.1:{port}" }}
rollout {{
  soak   = "{soak}"
  at_once = 4
}}
agent_class "default" {{
  version = "{version}"
  beat    = "500ms"
  probe "http" {{
    port     = {device}
    interval = "1s"
    timeout  = "500ms"
  }}
}}
"""
NAMES = tuple(f"d{number}" for number in range(6))


@pytest.mark.slow_because("four runs of the program, and two waits for what must not happen")
async def test_a_version_that_dies_late_is_given_up_by_itself(
    tmp_path: Path, directory: Path
) -> None:
    """Version 1 lasts. Of version 2, four agents become ready and wait for the end of the soak.
    When three of them die, the class is rolled back to version 1 automatically, and the two that
    were never replaced keep running throughout. The rollback is an event, a metric and in the
    status. A restart with version 2 changes nothing; version 3 is rolled out."""
    device = Listener(says(OK))
    program = Program(tmp_path)

    def configure(version: str, soak: str) -> None:
        text = CONFIG.format(
            root=tmp_path, port=program.port, device=device.port, version=version, soak=soak
        )
        program.file.write_text(text)

    async def versions() -> list[str]:
        found = (await program.get("/v1/devices"))["items"]
        good = all(one["verdict"] == "watched" for one in found)
        return sorted(one["version"] for one in found) if good and len(found) == 6 else []

    async def kinds() -> list[str]:
        found = (await program.get("/v1/events?kind=rollout"))["items"]
        names = {event["kind"] for event in found}
        return [kind for kind in ("rolled_back", "halted", "done") if f"rollout.{kind}" in names]

    async def rollouts() -> Any:
        return (await program.get("/v1/status"))["rollouts"]

    await device.start()
    try:
        configure("1", "1s")
        async with program.running():
            # it is empty before version 1 is watched, and again once that version has proved itself
            await eventually(rollouts, 90.0)
            await program.import_devices(*NAMES)
            await eventually(lambda: _is(versions(), ["1"] * 6), 90.0)
            await eventually(lambda: _is(rollouts(), {}), 90.0)
        first = set(pids_of(directory))
        configure("2", "120s")
        async with program.running():
            await eventually(lambda: _is(versions(), ["1", "1", "2", "2", "2", "2"]), 90.0)
            await asyncio.sleep(2.0)  # time in which another one could be replaced
            assert (await rollouts())["default"]["soaking"] == 4
            kept = first & set(pids_of(directory))
            assert len(kept) == 2
            for pid in sorted(set(pids_of(directory)) - first)[:3]:
                os.kill(pid, signal.SIGKILL)
            await eventually(lambda: _is(kinds(), ["rolled_back"]), 90.0)
            await eventually(lambda: _is(versions(), ["1"] * 6), 90.0)
            assert kept <= set(pids_of(directory))
            shown = (await program.json("status"))["rollouts"]["default"]
            assert (shown["wished"], shown["in_force"]) == ("2", "1")
            assert "agents of 3 devices ended" in shown["given_up"]
        back = set(pids_of(directory))
        async with program.running():
            await eventually(lambda: _is(versions(), ["1"] * 6), 90.0)
            await asyncio.sleep(3.0)  # time in which version 2 could be tried again
            assert set(pids_of(directory)) == back
        configure("3", "1s")
        async with program.running():
            await eventually(lambda: _is(versions(), ["3"] * 6), 90.0)
            await eventually(lambda: _is(kinds(), ["rolled_back", "done"]), 90.0)
    finally:
        await device.stop()


async def _is(found: Any, wanted: object) -> bool:
    return bool(await found == wanted)
