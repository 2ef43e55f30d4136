"""An upgrade of the control plane from the operator's view: the version that it brings waits (rollout.upgrades)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog import __version__
from nomad_watchdog.demo.process import Process
from nomad_watchdog.errors import TransientError
from nomad_watchdog.schedulers import agent_zipapp
from servers.nomad import NomadServer
from servers.replica import ControlPlane
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
_RUN = """
import runpy
runpy.run_module("nomad_watchdog", run_name="__main__", alter_sys=True)
"""
_UPGRADED = f"import nomad_watchdog\nnomad_watchdog.__version__ = {NEWER!r}\n{_RUN}"


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

        async def resumed() -> bool:
            code, _, err = await new("rollouts", "resume", "default")
            assert code == 0 or "has not begun yet" in err
            return code == 0

        await eventually(resumed, 60.0)
        code, out, err = await new("rollouts", "status", "default", "--wait")
        assert code == 0, (out, err)
        assert await versions() == {NEWER: 3}


async def _is(found: Any, wanted: object) -> bool:
    return bool(await found == wanted)


NOMAD_CONFIG = """\
backend = "nomad"
data_dir = "{root}"
registry {
  kind = "sqlite"
}
resync = "2s"
api {
  listen = "127.0.0.1:{port}"
}
nomad {
  address    = "NOMAD"
  job_prefix = "upgraded"
}
consul {
  agent_address = ""
}
rollout {
  upgrades = "wait"
}
agent_class "default" {
  beat      = "1s"
  variables = { python = "PYTHON" }
  probe "tcp" {
    port     = {port}
    interval = "1s"
    timeout  = "500ms"
  }
}
"""
_OTHER_FILE = """
from nomad_watchdog.errors import TransientError
from nomad_watchdog.schedulers import agent_zipapp
agent_zipapp._MAIN += b"# newer\\n"
"""


class UpgradedPlane(ControlPlane):
    """A control plane that starts with a later version and another agent file when `is_upgraded` is set."""

    is_upgraded = False

    async def start(self) -> None:
        code = _UPGRADED.replace(_RUN, _OTHER_FILE + _RUN)
        argv = [sys.executable, "-P"]
        argv += ["-c", code] if self.is_upgraded else ["-m", "nomad_watchdog"]
        argv += ["--config", str(self.file), "run"]
        self._process = Process.start(argv, log=self.log, env=self._env)


@pytest.mark.servers
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.slow_because("starts agents on Nomad, and replaces them after an upgrade")
async def test_on_nomad_the_proven_version_keeps_its_program(
    nomad: NomadServer, tmp_path: Path
) -> None:
    """After an upgrade that waits, a new device's agent is fetched from the file of the version before, which is still
    served; once it is resumed, from the new one."""
    config = NOMAD_CONFIG.replace("NOMAD", nomad.http_addr).replace("PYTHON", sys.executable)
    old = agent_zipapp.checksum()

    async def checksum(job: str) -> str:
        parent: Any = await nomad.request("GET", f"/v1/job/{job}")
        (fetched,) = parent["TaskGroups"][0]["Tasks"][0]["Artifacts"]
        return str(fetched["GetterOptions"]["checksum"]).removeprefix("sha256:")

    def stands(state: str) -> Callable[[Any], bool]:
        return lambda found: found["state"] == state

    def has(*versions: str) -> Callable[[Any], bool]:
        return lambda found: (
            sorted(one["version"] for one in found["items"] if one["verdict"] == "watched")
            == sorted(versions)
        )

    async def resumed(plane: ControlPlane) -> bool:
        try:
            await plane.call("POST", "/v1/rollouts/default/resume", {})
        except TransientError as error:
            assert "has not begun yet" in str(error)
            return False
        return True

    async with UpgradedPlane(tmp_path, "plane", config) as plane:
        try:
            await plane.register("a")
            await plane.until("/v1/rollouts/default", stands("complete"), 120.0)
            await plane.process.terminate(15.0)
            plane.is_upgraded = True
            await plane.start()
            await plane.ready()
            await plane.until("/v1/rollouts/default", stands("paused"), 60.0)
            await plane.register("b")
            await plane.until("/v1/devices", has(__version__, __version__), 120.0)
            assert await checksum("upgraded") == old
            await eventually(lambda: resumed(plane), 60.0)
            await plane.until("/v1/rollouts/default", stands("complete"), 120.0)
            await plane.until("/v1/devices", has(NEWER, NEWER), 120.0)

            async def is_new() -> bool:
                return await checksum("upgraded") != old

            await eventually(is_new, 30.0)
        finally:
            for name in ("a", "b"):
                with suppress(TransientError):
                    await plane.call("DELETE", f"/v1/devices/{name}")
            await plane.until("/v1/status", lambda found: found["placements"] == 0, 60.0)
