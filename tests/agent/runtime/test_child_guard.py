"""Programs that an agent starts end when it ends, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from watchdog_agent.runtime import child_guard

from tests.agent.world import AGENT, World, document, until

NULL = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]


def gone(pid: int) -> bool:
    """Whether no process with this PID runs; a zombie does not count."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def stubborn(pids: Path) -> list[str]:
    """A program with a child that both ignore SIGTERM, write their PIDs and end after ten minutes."""
    child = f"trap '' TERM; echo $$ >> {pids}; sleep 600"
    return ["sh", "-c", f"trap '' TERM; echo $$ >> {pids}; sh -c \"{child}\" & sleep 600"]


async def killed(world: World, pids: Path, **changes: Any) -> None:
    """Start an agent, wait for its program and the program's child, kill -9 the agent, and expect both gone."""
    agent = await world.started(**changes)
    if "repairs" in changes:
        await world.peer.saw("accepted", state="ok", ready=True)
        await world.device.stop()
    found = await until(
        lambda: pids.exists() and len(pids.read_text().split()) == 2 and pids.read_text(), "both"
    )
    assert not any(gone(int(pid)) for pid in found.split())
    os.kill(agent.pid, signal.SIGKILL)
    for pid in found.split():
        await until(lambda pid=int(pid): gone(pid), f"{pid} is gone", 60.0)


async def test_a_probe_ends_with_a_killed_agent(world: World, tmp_path: Path) -> None:
    """kill -9 of an agent ends the command of a running probe, with its children."""
    pids = tmp_path / "pids"
    spec = {
        "kind": "command",
        "command": stubborn(pids),
        "timeout_s": 500.0,
        "interval_s": 600.0,
        "jitter": 0.0,
    }
    await killed(world, pids, probes=[spec])


async def test_a_repair_ends_with_a_killed_agent(world: World, tmp_path: Path) -> None:
    """kill -9 of an agent ends the command of a running repair, with its children."""
    pids = tmp_path / "pids"
    step = {"kind": "command", "command": stubborn(pids), "timeout_s": 500.0}
    await killed(world, pids, repairs=[step])


def test_what_a_finished_program_leaves_behind_lives() -> None:
    """If a program starts a service and ends, the service outlives it and its guard."""
    script = "sleep 600 & echo $!"
    read, write = os.pipe()
    program = child_guard.GuardedProcess(
        ["sh", "-c", script], dict(os.environ), [*NULL, (os.POSIX_SPAWN_DUP2, write, 1)]
    )
    os.close(write)
    child = int(os.read(read, 20))
    os.close(read)
    assert program.reap() == 0
    try:
        time.sleep(0.3)  # time in which the guard could kill it
        assert not gone(child)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("shell", [child_guard.SHELL, "/no/shell"])
def test_a_program_gets_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    """Arguments, environment and exit code are the program's own, whether or not the guard uses a shell; none of our
    descriptors reaches it but its three."""
    monkeypatch.setattr(child_guard, "SHELL", shell)
    out = tmp_path / "out"
    text = (
        "import os,sys,json; fds=[n for n in range(64) if os.path.exists(f'/proc/self/fd/{n}')];"
        "json.dump((sys.argv[2:], os.environ['ONE'], fds), open(sys.argv[1],'w')); sys.exit(7)"
    )
    words = ["$(id); a b", "-n", "", "*"]
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    try:
        program = child_guard.GuardedProcess(
            [sys.executable, "-c", text, str(out), *words], {"ONE": "x y"}, NULL
        )
        assert os.waitstatus_to_exitcode(program.reap() or 0) == 7
    finally:
        for one in held:
            os.close(one)
    # all programs inherit what this process itself was started with
    given = [fd for fd in range(3, 64) if Path(f"/proc/self/fd/{fd}").exists()]
    expected = [0, 1, 2, *(fd for fd in given if os.get_inheritable(fd))]
    assert json.loads(out.read_text()) == [words, "x y", expected]


def test_a_program_that_is_not_there_is_an_error_of_the_start(tmp_path: Path) -> None:
    """A missing program, a folder and a file that is not executable are OSErrors with the kernel's message; a null
    character is a ValueError."""
    plain = tmp_path / "plain"
    plain.write_text("x")
    for argv, error in (
        ("/no/such", FileNotFoundError),
        ("no-such-program", FileNotFoundError),
        (str(tmp_path), PermissionError),
        (str(plain), PermissionError),
    ):
        with pytest.raises(error):
            child_guard.GuardedProcess([argv], {}, NULL)
    for words in (["tr\0ue"], ["true", "\0"]):
        with pytest.raises(ValueError, match="null"):
            child_guard.GuardedProcess(words, {}, NULL)
    assert not child_guard._left


@pytest.mark.slow_because("counts dead children for six seconds of an agent's life")
def test_no_corpse_stays_where_the_agent_is_process_1(tmp_path: Path) -> None:
    """In a PID namespace of its own, where orphans become the agent's children, many runs of a program with a child
    leave no zombie."""
    config = document(
        probes=[
            {
                "kind": "command",
                "command": ["sh", "-c", "sleep 600 & exit 0"],
                "interval_s": 0.05,
                "min_interval_s": 0.05,
                "timeout_s": 5.0,
            }
        ],
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(AGENT),
        "WATCHDOG_CONFIG": str(tmp_path / "config.json"),
    }
    argv = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        sys.executable,
        "-P",
        "-m",
        "watchdog_agent",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(argv, env=env, stderr=log)
    try:
        most = 0
        deadline = time.monotonic() + 6.0
        while time.monotonic() < deadline:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children:
                agent = children[0]
                mine = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
                most = max(most, sum(gone(int(one)) for one in mine))
            time.sleep(0.05)
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert most < 10, f"{most} corpses"
    finally:
        process.kill()
        process.wait()
