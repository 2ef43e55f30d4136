"""The wheel works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

PROGRAM = """
import nomad_watchdog, watchdog_agent
from pathlib import Path
from nomad_watchdog.schedulers import job_templates as templates
from nomad_watchdog.schedulers.agent_zipapp import build_agent
assert nomad_watchdog.__file__.startswith({root!r}), nomad_watchdog.__file__
assert watchdog_agent.__file__.startswith({root!r}), watchdog_agent.__file__
for name in ("device-watchdog", "device-watchdog-docker"):
    assert "parameterized" in templates.load(name).text
print(build_agent(Path("agent.pyz")))
"""


def test_a_wheel_holds_all_that_runs(tmp_path: Path, repository: Path) -> None:
    """Unpacked outside the checkout, the wheel has both packages and the job templates, runs the CLI, and builds an
    agent."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps",
         "-w", tmp_path, repository],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("nomad_watchdog-*.whl")
    root = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(root)
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    assert len(run("-c", PROGRAM.format(root=str(root))).strip()) == 64
    assert run("-m", "nomad_watchdog", "config", "check") == "built-in defaults: valid\n"
    assert (tmp_path / "agent.pyz").stat().st_size > 10_000
