"""The agent as a separate wheel."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import nomad_watchdog
from tests.agent.world import World


def built(folder: Path, repository: Path) -> Path:
    """The wheel built from agent/."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps",
         "-w", folder, repository / "agent"],
        check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("nomad_watchdog_agent-*.whl")
    return wheel


async def test_the_wheel_installs_alone_and_its_command_is_an_agent(
    world: World, tmp_path: Path, repository: Path
) -> None:
    """Installed without an index into an empty environment, `watchdog-agent` probes, reports and ends as usual."""
    wheel = built(tmp_path, repository)
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "-q",
         "--disable-pip-version-check", "--no-index", wheel],
        check=True,
    )  # fmt: skip
    agent = world.agent(argv=[str(place / "bin" / "watchdog-agent")])
    agent.extra = {"PYTHONPATH": ""}
    await agent.start()
    await world.peer.saw("ready", ready=True, state="ok")
    assert str(place) in Path(f"/proc/{agent.pid}/cmdline").read_text()
    assert await agent.signal(signal.SIGTERM) == 128 + signal.SIGTERM


def test_the_wheel_has_the_projects_version_and_its_sources(
    tmp_path: Path, repository: Path
) -> None:
    """The wheel requires no other package, has the version of the project, and contains each source of the agent."""
    with zipfile.ZipFile(built(tmp_path, repository)) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (n for n in names if n.endswith("/METADATA"))
        text = wheel.read(metadata).decode()
    assert "Requires-Dist" not in text
    found = re.search(r"^Version: (.*)$", text, re.MULTILINE)
    assert found is not None
    assert found[1] == nomad_watchdog.__version__
    sources = repository / "agent" / "watchdog_agent"
    assert {f"watchdog_agent/{one.relative_to(sources)}" for one in sources.rglob("*.py")} <= names
