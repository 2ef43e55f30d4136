"""Managing the real servers: finding, building, starting, stopping.

A stub replaces the Go compiler, whose work takes minutes; `make` runs the real build.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nomad_watchdog.demo import process
from nomad_watchdog.demo.process import Process, free_port, give_back, take_block
from nomad_watchdog.errors import TerminalError, UserError
from servers import binaries

GO = """#!/bin/sh
[ "$1" = version ] && {{ echo go version go1.26.0 linux/amd64; exit 0; }}
echo built >> "{folder}/builds"
{build}
"""
BUILD = 'printf "#!/bin/sh\\necho Nomad v1.11.3\\n" > "$3"; chmod +x "$3"; sleep 0.5'


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a PATH without servers and with a stub for Go."""
    monkeypatch.setenv("NOMAD_WATCHDOG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(binaries, "found", {})
    go = tmp_path / "go"
    go.write_text(GO.format(folder=tmp_path, build=BUILD))
    go.chmod(0o755)
    return go


def test_two_runs_build_once(stub: Path) -> None:
    """Of two simultaneous runs one builds, the other waits, and both print the same path."""
    argv = [sys.executable, "-m", "servers.binaries", "nomad"]
    runs = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {run.communicate(timeout=60)[0].strip() for run in runs}
    assert paths == {str(stub.parent / "cache/build/nomad")}
    assert (stub.parent / "builds").read_text() == "built\n"
    assert binaries.find("nomad") == stub.parent / "cache/build/nomad"


def test_failed_build_names_its_log(stub: Path) -> None:
    """A failed build is a TerminalError that names the log, and leaves no program behind."""
    stub.write_text(GO.format(folder=stub.parent, build="echo no such module; exit 1"))
    with pytest.raises(TerminalError, match=r"nomad\.log"):
        binaries.find("nomad")
    assert "no such module" in (stub.parent / "cache/build/nomad.log").read_text()
    assert not (stub.parent / "cache/build/nomad").exists()


def test_old_program_on_path_is_passed_over(stub: Path) -> None:
    """A Nomad older than 1.6.0 on PATH is not used, any later one is."""
    old = stub.parent / "nomad"
    old.write_text("#!/bin/sh\necho Nomad v1.5.17\n")
    old.chmod(0o755)
    assert binaries.find("nomad") != old
    old.write_text("#!/bin/sh\necho Nomad v1.12.0\n")
    assert binaries.find("nomad") == old


def test_unknown_program_is_a_user_error() -> None:
    """An unknown program is rejected with the names of the known ones."""
    with pytest.raises(UserError, match=r"known are: .*consul, .*nomad"):
        binaries.find("vault")


def test_free_ports_are_distinct() -> None:
    """A hundred ports are all different and never a server's default."""
    ports = {free_port() for _ in range(100)}
    assert len(ports) == 100
    assert not ports & {4646, 4647, 4648, 8500, 8300, 8301}


def test_no_port_is_given_to_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forty ports one process takes twenty; while it runs, another process gets only the others, later also
    those."""
    few = range(32_000, 32_040)  # no other test has ports there
    code = (
        "from nomad_watchdog.demo import process\n"
        f"process._PORTS = {few}\n"
        "print([process.free_port() for _ in range(20)], flush=True)\n"
        "input()"
    )
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        theirs = set(json.loads(other.stdout.readline()))
        monkeypatch.setattr(process, "_PORTS", few)
        monkeypatch.setattr(process, "_handed_out", set())
        ours = {free_port() for _ in range(15)}
        assert not ours & theirs
        other.communicate("\n")
    assert {free_port() for _ in range(20)} & theirs


async def test_terminate_takes_the_whole_group(tmp_path: Path) -> None:
    """A process that ignores SIGTERM is killed after the grace, and its child with it."""
    script = "trap '' TERM; sleep 300 & echo $!; wait; wait"
    process = Process.start(["sh", "-c", script], log=tmp_path / "log")
    async with asyncio.timeout(10):
        while not (text := process.log_tail().strip()):
            await asyncio.sleep(0.01)
    assert await process.terminate(grace_s=0.2) == -signal.SIGKILL
    async with asyncio.timeout(10):
        while Path(f"/proc/{text}").exists() and "Z" not in _state(text):
            await asyncio.sleep(0.01)
    assert await process.terminate() == -signal.SIGKILL


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_missing_program_is_a_terminal_error(tmp_path: Path) -> None:
    """A missing program is reported by name."""
    with pytest.raises(TerminalError, match="nowhere"):
        Process.start([tmp_path / "nowhere"], log=tmp_path / "log")


def test_blocks_of_ports_are_apart_also_between_processes() -> None:
    """No two servers choose dynamic ports from one block, and a block that was released is used again."""
    blocks = [1_000_000 + 3 * os.getpid() + n for n in range(3)]  # unused by other processes
    first, second = take_block(blocks), take_block(blocks)
    try:
        code = f"from nomad_watchdog.demo.process import take_block; print(take_block({blocks}))"
        third = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        assert [first, second, int(third)] == blocks
        give_back(first)
        assert take_block(blocks) == first
    finally:
        give_back(first)
        give_back(second)
