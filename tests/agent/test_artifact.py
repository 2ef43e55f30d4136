"""The single-file agent as a file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nomad_watchdog.schedulers.agent_zipapp import (
    MAX_KEPT,
    Installed,
    build_agent,
    is_checksum,
    publish,
    published,
)

_SUM = "import asyncio, hypothesis, watchdog_agent.main\nfrom nomad_watchdog.schedulers import agent_zipapp as artifact\nprint(artifact.checksum())"


def test_same_sources_same_bytes(tmp_path: Path) -> None:
    """Two builds give the same bytes and their checksum, whatever the files' times are."""
    one, two = tmp_path / "a.pyz", tmp_path / "b.pyz"
    assert build_agent(one) == build_agent(two) == hashlib.sha256(one.read_bytes()).hexdigest()
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_mode & 0o777 == 0o755
    assert one.read_bytes().startswith(b"#!/usr/bin/env python3\n")


def test_the_sum_is_the_same_in_every_process(tmp_path: Path) -> None:
    """The checksum depends neither on the modules that a process has loaded nor on its hash seed: all replicas, and a
    restarted one, name the same file."""
    other = subprocess.run(
        [sys.executable, "-c", _SUM],
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert other.stdout.strip() == build_agent(tmp_path / "a.pyz")


def test_files_of_earlier_versions_are_kept_some_versions_long(tmp_path: Path) -> None:
    """A restarted control plane still has the file that agents of recent versions name, and drops older ones."""
    sha256 = publish(tmp_path)
    shelf = published(tmp_path, sha256).parent
    for number in range(6):
        old = shelf / f"{number:064}.pyz"
        old.write_bytes(b"old")
        os.utime(old, (number, number))
    publish(tmp_path)
    names = sorted(one.stem for one in shelf.iterdir())
    assert names == sorted([sha256, *(f"{number:064}" for number in (3, 4, 5))])
    assert len(names) == MAX_KEPT
    assert (
        published(tmp_path, sha256).read_bytes() == (tmp_path / "watchdog-agent.pyz").read_bytes()
    )


@pytest.mark.parametrize("text", ["", "x", "a" * 63, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61])
def test_what_is_not_a_checksum_is_not_one(text: str) -> None:
    """Only 64 hexadecimal digits can become a path."""
    assert not is_checksum(text)


def test_changed_installed_files_are_noticed(tmp_path: Path) -> None:
    """A changed, an added and a removed file are detected, whatever size and time they have; the same content is not a
    change."""
    file = tmp_path / "one.py"
    file.write_text("a = 1\n")
    installed = Installed(tmp_path)
    times = file.stat()
    assert installed.problem() == ""
    for text, said in (("a = 2\n", True), ("a = 1\n", False)):
        file.write_text(text)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert ("have changed" in installed.problem()) is said
    (tmp_path / "two.py").write_text("")
    assert "restart the control plane" in installed.problem()


def test_an_equal_file_is_left_alone(tmp_path: Path) -> None:
    """A file that already contains the agent is not written again; a different one is replaced completely."""
    path = tmp_path / "a.pyz"
    build_agent(path)
    before = path.stat().st_ino
    build_agent(path)
    assert path.stat().st_ino == before
    path.write_bytes(b"old")
    build_agent(path)
    assert zipfile.is_zipfile(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pyz"]


def test_it_holds_the_agent_and_nothing_else(tmp_path: Path) -> None:
    """The file has an entry point and the modules of the agent, in order."""
    path = tmp_path / "a.pyz"
    build_agent(path)
    names = zipfile.ZipFile(path).namelist()
    assert names == sorted(names)
    assert {n.partition("/")[0] for n in names} == {"__main__.py", "__main__.pyc", "watchdog_agent"}
    assert "watchdog_agent/main.py" in names


def test_another_python_runs_it_from_source(tmp_path: Path) -> None:
    """If the compiled code is for another version, the same file starts from its sources."""
    path, other = tmp_path / "a.pyz", tmp_path / "b.pyz"
    build_agent(path)
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(other, "w") as theirs:
        for name in ours.namelist():
            body = ours.read(name)
            theirs.writestr(name, b"\x00\x00\r\n" + body[4:] if name.endswith("c") else body)
    run = subprocess.run(
        [sys.executable, "-I", "-S", str(other)],
        env={},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (run.returncode, "WATCHDOG_CONFIG" in run.stderr) == (64, True)


def test_command_and_run(tmp_path: Path) -> None:
    """`python -m nomad_watchdog.schedulers.agent_zipapp` builds it, and run without a configuration it exits with
    64."""
    path = tmp_path / "a.pyz"
    done = subprocess.run(
        [sys.executable, "-m", "nomad_watchdog.schedulers.agent_zipapp", str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.strip() == hashlib.sha256(path.read_bytes()).hexdigest()
    run = subprocess.run(
        [sys.executable, "-I", "-S", str(path)],
        env={},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert run.returncode == 64
    assert "WATCHDOG_CONFIG" in run.stderr
