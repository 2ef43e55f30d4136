"""Foreign code is not run: from the working directory, from PYTHONPATH, or from a changed agent
file (H7, H15)."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import watchdog_agent

from nomad_watchdog.model import Epoch, PlacementState
from nomad_watchdog.schedulers import agent_zipapp
from nomad_watchdog.schedulers.local import LocalScheduler
from nomad_watchdog.schedulers.local._zygote import Parents
from nomad_watchdog.testing.conformance import record_of
from tests.attacks.table import Attack
from tests.schedulers.conftest import agent_spec, eventually

NAMES = ("watchdog_agent", "nomad_watchdog", "json", "socket", "sitecustomize", "usercustomize")
OWNER = """
import asyncio, os, sys
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers.local import LocalScheduler
from nomad_watchdog.testing.conformance import record_of
async def main():
    config = {"v": 1, "probes": [{"kind": "tcp", "port": 9, "interval_s": 30.0}]}
    spec = AgentSpec(agent_class="default", version="1", spec_hash="h1", agent_config=config)
    os.environ["PYTHONPATH"] = os.getcwd()
    scheduler = LocalScheduler(directory=sys.argv[1], fork=sys.argv[2] == "fork")
    record = record_of("crane-7")
    await scheduler.ensure(record, Epoch(1), spec)
    print("placed", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for one in (await scheduler.snapshot()).placements[record.slug]:
        await scheduler.retire(one, 5.0)
    await scheduler.close()
asyncio.run(main())
"""


def foreign(folder: Path) -> Path:
    """A folder of modules that record that they were run, and the file that they write to."""
    folder.mkdir()
    ran = folder / "ran"
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    return ran


@pytest.mark.attack(
    "H7", "modules named as ours and Python's in the working folder and PYTHONPATH, local agents"
)
@pytest.mark.parametrize("how", ["fork", "spawn"])
async def test_h7_local_agents_run_nothing_from_the_working_folder(
    tmp_path: Path, directory: Path, attack: Attack, how: str
) -> None:
    """An agent that is forked or spawned by a control plane with a hostile working directory and
    PYTHONPATH starts, and no foreign module is run."""
    ran = foreign(tmp_path / "foreign")
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", OWNER, str(directory), how),
        cwd=tmp_path / "foreign",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        log = directory / record_of("crane-7").slug / "agent.log"
        await eventually(lambda: log.exists() and "agent started" in log.read_text())
    finally:
        await asyncio.wait_for(owner.communicate(b""), 60.0)
    assert not ran.exists()
    attack.tried, attack.result = len(NAMES), f"agents by {how}: started, 0 foreign modules run"


@pytest.mark.attack("H7", "the same, with the command lines of the images")
@pytest.mark.parametrize("image", ["agent", "jobs"])
def test_h7_the_images_run_nothing_from_the_working_folder(
    repository: Path, tmp_path: Path, attack: Attack, image: str
) -> None:
    """The entry point of each image, run in a hostile working directory, starts our program and no
    foreign module."""
    ran = foreign(tmp_path / "foreign")
    text = (repository / image / "Dockerfile").read_text()
    (line,) = (one for one in text.splitlines() if one.startswith("ENTRYPOINT"))
    words = json.loads(line.removeprefix("ENTRYPOINT "))
    packages = [
        str(repository),
        str(repository / "agent"),
        *(one for one in sys.path if "site-" in one),
    ]
    run = subprocess.run(
        [sys.executable, *words[1:], "--version"],
        cwd=ran.parent,
        env={"PYTHONPATH": os.pathsep.join(packages)},  # as the image sets it
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, "WATCHDOG_CONFIG" in run.stderr) in ((64, True), (0, False)), run.stderr
    assert not ran.exists()
    attack.tried, attack.result = len(NAMES), "0 foreign modules run"


def test_h15_a_module_in_front_of_a_source_is_a_change(tmp_path: Path) -> None:
    """An extension module that Python would load instead of the agent's source is noticed; Python's caches are no
    change."""
    folder = tmp_path / "watchdog_agent"
    shutil.copytree(Path(watchdog_agent.__file__).parent, folder)
    installed = agent_zipapp.Installed(folder)
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__" / "main.cpython-399.pyc").write_bytes(b"")
    assert installed.problem() == ""
    extension = folder / f"main{EXTENSION_SUFFIXES[0]}"
    extension.write_bytes(b"")
    assert "have changed" in installed.problem()
    extension.unlink()
    assert installed.problem() == ""


@pytest.mark.attack("H15", "files of the agent changed under a running control plane, local agents")
async def test_h15_a_changed_agent_is_not_started_locally(
    directory: Path, tmp_path: Path, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a file of the installed agent has changed, no local agent is started, and the reason
    names the files; once the original is back, the agent starts."""
    folder = tmp_path / "watchdog_agent"
    shutil.copytree(Path(watchdog_agent.__file__).parent, folder)
    scheduler = LocalScheduler(directory=directory, backoff_initial_s=0.1, poll_s=0.1)
    monkeypatch.setattr(scheduler._parents, "_installed", agent_zipapp.Installed(folder))
    assert isinstance(scheduler._parents, Parents)
    file = folder / "main.py"
    original = file.read_text()
    record = record_of("crane-7")
    try:
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{original}")
        await scheduler.ensure(record, Epoch(1), agent_spec())
        (one,) = (await scheduler.snapshot()).placements[record.slug]
        assert one.state is PlacementState.RESTARTING
        assert f"its files in {folder} have changed" in one.reason
        assert not (tmp_path / "ran").exists()
        file.write_text(original)

        async def runs() -> bool:
            (now,) = (await scheduler.snapshot()).placements[record.slug]
            return now.state is PlacementState.RUNNING

        await eventually(runs)
        (one,) = (await scheduler.snapshot()).placements[record.slug]
        await scheduler.retire(one, 5.0)
    finally:
        await scheduler.close()
    attack.tried, attack.result = 1, "not started, with the reason; started once they were restored"
