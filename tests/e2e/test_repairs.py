"""A repair from the operator's view: the program, an agent, and a device that is brought back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.agent.world import OK, Listener, says
from tests.e2e.test_program import Program, directory
from tests.schedulers.conftest import eventually

__all__ = ["directory"]

CONFIG = """\
data_dir = "{root}"
api {{ listen = "127.0.0.1:{port}" }}
agent_class "default" {{
  beat = "500ms"
  probe "http" {{
    port     = {device}
    interval = "200ms"
    timeout  = "150ms"
    misses   = 2
  }}
  repair "command" {{
    command = ["false"]
    dry_run = true
  }}
  repair "http" {{
    url    = "http://127.0.0.1:{helper}/outlet"
    verify = "20s"
  }}
}}
"""


@pytest.mark.slow_because("an agent finds its device dead, and repairs it")
async def test_a_repair_is_a_verdict_an_event_and_a_part_of_explain(
    tmp_path: Path, directory: Path
) -> None:
    """While a step runs the device is `repairing`, with the step's name in the reason. Once it is
    back, the attempts are shown as events and in explain; it was never called offline."""
    device = Listener(says(OK))
    go = asyncio.Event()

    async def mend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go.wait()
        await device.start()
        writer.write(OK)
        await writer.drain()

    helper = Listener(mend)
    program = Program(tmp_path)
    program.file.write_text(
        CONFIG.format(root=tmp_path, port=program.port, device=device.port, helper=helper.port)
    )
    await device.start()
    await helper.start()

    async def is_in(verdict: str) -> Any:
        found = await program.ask("GET", "/v1/devices/a/explain")
        return found["verdict"] == verdict and found

    try:
        async with program.running():
            await program.import_devices("a")
            await eventually(lambda: is_in("watched"), 60.0)
            await device.stop()
            seen = await eventually(lambda: is_in("repairing"), 60.0)
            assert f"repairing: http 127.0.0.1:{helper.port}; " in seen["reason"]
            go.set()
            await eventually(lambda: is_in("watched"), 60.0)
            seen = await program.json("explain", "a")
    finally:
        await device.stop()
        await helper.stop()
    attempts = seen["report"]["repairs"]["attempts"]
    assert [one["outcome"] for one in attempts] == ["dry run", "recovered"]
    kinds = [event["kind"] for event in seen["events"]]
    assert {"verdict.repairing", "repair.dry_run", "repair.recovered"} <= set(kinds)
    assert "verdict.offline" not in kinds
