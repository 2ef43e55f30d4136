"""The single-file agent as a file."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from nomad_watchdog.artifact import build_agent


def test_same_sources_same_bytes(tmp_path: Path) -> None:
    """Two builds give the same bytes and the sum of them, whatever the files' times are."""
    one, two = tmp_path / "a.pyz", tmp_path / "b.pyz"
    assert build_agent(one) == build_agent(two) == hashlib.sha256(one.read_bytes()).hexdigest()
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_mode & 0o777 == 0o755
    assert one.read_bytes().startswith(b"#!/usr/bin/env python3\n")


def test_an_equal_file_is_left_alone(tmp_path: Path) -> None:
    """A file that holds the agent already is not written again; another one is replaced whole."""
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
    """Where the compiled code is another version's, the same file starts from its sources."""
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
    """`python -m nomad_watchdog.artifact` builds it, and run without a configuration it ends with 64."""
    path = tmp_path / "a.pyz"
    done = subprocess.run(
        [sys.executable, "-m", "nomad_watchdog.artifact", str(path)],
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
