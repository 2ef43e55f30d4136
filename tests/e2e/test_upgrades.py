"""An upgrade of the control plane from the operator's view: the version that it brings waits (rollout.upgrades)."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog import __version__
from tests.e2e.test_apply import Patient
from tests.e2e.test_program import Program, directory
from tests.schedulers.conftest import eventually

__all__ = ["directory"]

CONFIG = """\
data_dir = "{root}"
api {{ listen = "127.0.0.1:{port}" }}
rollout {{ upgrades = "wait" }}
agent_class "default" {{
  memory = "{memory}"
  probe "tcp" {{ port = {port} }}
}}
"""
NEWER = "99.0.0"
_UPGRADED = f"""
import runpy
import nomad_watchdog
nomad_watchdog.__version__ = "{NEWER}"
runpy.run_module("nomad_watchdog", run_name="__main__", alter_sys=True)
"""


class UpgradedProgram(Patient):
    """The same program with a later version, on the same configuration file."""

    def __init__(self, before: Program) -> None:
        self.root, self.port, self.file, self.env = (
            before.root,
            before.port,
            before.file,
            before.env,
        )

    async def start(self, *argv: str, **env: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _UPGRADED, "--config", str(self.file), *argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.env | env,
        )


@pytest.mark.slow_because("two runs of the program, and two roll-outs")
async def test_an_upgrade_waits_with_what_the_user_changed(tmp_path: Path, directory: Path) -> None:
    """`plan` announces the version and the changed memory; after the upgrade the agents stay, a new device gets the
    version before, and `rollouts resume` brings both changes to all devices."""
    old = Patient(tmp_path)
    text = CONFIG.format(root=tmp_path, port=old.port, memory="{memory}")
    old.file.write_text(text.replace("{memory}", "64Mi"))

    async def versions() -> dict[str, int]:
        found: list[str] = [one["version"] for one in (await old.get("/v1/devices"))["items"]]
        return {one: found.count(one) for one in found}

    async def state() -> Any:
        return (await old.get("/v1/rollouts/default"))["state"]

    async with old.running():
        await old.import_devices("a", "b")
        await eventually(lambda: _is(versions(), {__version__: 2}), 90.0)
        await eventually(lambda: _is(state(), "complete"), 60.0)
    old.file.write_text(text.replace("{memory}", "80Mi"))
    new = UpgradedProgram(old)
    code, out, err = await new("plan")
    assert code == 0, err
    assert "class default: roll-out in steps, step 1 of 1, it waits for an operator" in out
    assert f"version {__version__} → {NEWER}" in out
    assert "memory 64Mi → 80Mi" in out
    async with new.running():
        code, out, err = await new("rollouts", "status", "default", "--wait")
        assert (code, "because the control plane was upgraded" in out) == (75, True), (out, err)
        await new.import_devices("a", "b", "c")
        await eventually(lambda: _is(versions(), {__version__: 3}), 90.0)
        assert (await new("rollouts", "resume", "default"))[0] == 0
        code, out, err = await new("rollouts", "status", "default", "--wait")
        assert code == 0, (out, err)
        assert await versions() == {NEWER: 3}


async def _is(found: Any, wanted: object) -> bool:
    return bool(await found == wanted)
