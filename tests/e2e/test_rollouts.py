"""A roll-out in steps from the operator's view: the program, its agents and the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.agent.world import OK, Listener, says
from tests.e2e.test_apply import Patient
from tests.e2e.test_program import Program, directory
from tests.schedulers.conftest import eventually

__all__ = ["directory"]

CONFIG = """\
data_dir = "{root}"
api {{ listen = "127.0.0.1:{port}" }}
rollout {{
  step {{ count = 2   soak = "100s" }}
  step {{ pause = true }}
  well_before = "1s"
}}
agent_class "default" {{
  version = "{version}"
  beat    = "500ms"
  probe "http" {{
    port     = {device}
    interval = "1s"
    timeout  = "500ms"
    misses   = 1
  }}
  confirm "tcp" {{
    port = {alive}
  }}
}}
"""
NAMES = tuple(f"d{number}" for number in range(6))


@pytest.mark.slow_because("two runs of the program, and four roll-outs")
async def test_a_bad_version_is_tried_on_two_devices_only(
    tmp_path: Path, directory: Path
) -> None:  # it stops the agents
    """Version 2 asks a port where nothing listens: two devices turn degraded, and the class goes back by itself.
    Version 3 has two devices, and soaks and waits until it is promoted, and `undo` returns to version 1."""
    device, alive, program = Listener(says(OK)), Listener(says(OK)), Patient(tmp_path)
    await device.start()
    await alive.start()

    def configure(version: str, port: int) -> None:
        text = CONFIG.format(
            root=tmp_path, port=program.port, alive=alive.port, version=version, device=port
        )
        program.file.write_text(text)

    async def versions() -> list[str]:
        return sorted(
            one["version"] for one in await _items(program) if one["verdict"] == "watched"
        )

    async def state() -> Any:
        return (await program.get("/v1/rollouts/default"))["state"]

    async def wait(code: int, state: str) -> Any:
        done, out, err = await program("rollouts", "status", "default", "--wait")
        assert (done, state in out) == (code, True), (out, err)

    try:
        configure("1", device.port)
        async with program.running():
            await program.import_devices(*NAMES)
            await eventually(lambda: _is(versions(), ["1"] * 6), 90.0)
            await wait(0, "default 1: complete")
        configure("2", 1)
        async with program.running():
            await wait(70, "default 2: aborted")
            await eventually(lambda: _is(versions(), ["1"] * 6), 90.0)
            events = (await program.get("/v1/events?kind=condition"))["items"]
            events += (await program.get("/v1/events?kind=verdict"))["items"]
            bad = {one["device"] for one in events if one["data"].get("verdict") == "degraded"}
            assert len(bad) <= 2, "no more than the devices of the step were tried"
            _, out, _ = await program("rollouts", "history", "default")
            assert "aborted" in out
            assert "are not well since they have it" in out

            configure("3", device.port)
            assert (await program("rollouts", "ls"))[0] == 0
            await program.ask("POST", "/v1/config:reload")
            await eventually(lambda: _is(state(), "soaking"), 90.0)
            assert (await program("rollouts", "promote", "default"))[0] == 0
            await wait(75, "default 3: paused, step 2 of 3")
            assert await versions() == ["1"] * 4 + ["3"] * 2
            _, out, _ = await program("status")
            line = "roll-out: default 3: paused, step 2 of 3; 2 ok, 0 bad, 4 waiting; next: nothing"
            assert line in out, out
            told = [await program.json("explain", name) for name in NAMES]
            said = [one["rollout"] for one in told]
            assert [
                one["next"] for one in told if one["rollout"].startswith("the device keeps")
            ] == [one for one in said if one.startswith("the device keeps")]
            keeps = "the device keeps version 1 until step 3 of 3 of the roll-out of version 3 (now"
            assert sum(one.startswith(keeps) for one in said) == 4, said
            assert "<td><bdi>the device keeps version 1 until step 3" in await page(program)
            _, out, _ = await program("rollouts", "diff", "default")
            assert out.startswith("version 1 -> 3\n")
            assert "version 1 → 3" in out
            assert (await program("rollouts", "promote", "default"))[0] == 0
            await wait(0, "default 3: complete")
            assert await versions() == ["3"] * 6

            assert (await program("rollouts", "undo", "default"))[0] == 0
            await eventually(lambda: _is(versions(), ["1"] * 6), 90.0)
            code, _, err = await program("rollouts", "undo", "default")
            assert (code, "given up already: undone by" in err) == (64, True), err
            audit = (await program.get("/v1/events?kind=audit"))["items"]
            assert {"promote", "undo"} <= {one["data"].get("outcome") for one in audit}
    finally:
        await device.stop()
        await alive.stop()


async def page(program: Program) -> str:
    """The text of the status page."""
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"http://127.0.0.1:{program.port}/") as response,
    ):
        return await response.text()


async def _items(program: Program) -> list[Any]:
    found: list[Any] = (await program.get("/v1/devices"))["items"]
    return found


async def _is(found: Any, wanted: object) -> bool:
    return bool(await found == wanted)
