"""An interrupted run, or one whose workers crash, leaves nothing behind: tested with pytest itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nomad_watchdog.demo.process import Process

CONFTEST = """
import os
from tests.suite import interrupts
from xdist.workermanage import NodeManager

NodeManager.EXIT_TIMEOUT = 0.2
interrupts.TEAR_DOWN_S = float(os.environ["TEAR_DOWN_S"])
interrupts.END_S = 0.5

def pytest_configure(config):
    config.pluginmanager.register(interrupts)
"""

TESTS = """
import asyncio, os, pathlib, signal, subprocess
import pytest, pytest_asyncio
from servers.netns import Network
from nomad_watchdog.demo.process import Process

HERE = pathlib.Path(__file__).parent
WORKER = os.environ["PYTEST_XDIST_WORKER"]

def note(what):
    with (HERE / f"{WORKER}.notes").open("a") as file:
        file.write(what + "\\n")

@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    stubborn = "trap '' TERM; while :; do sleep 300; done"
    argv = ["sh", "-c", stubborn] if STUCK else ["sleep", "300"]
    process = Process.start(argv, log=folder / "log")
    note(f"pid {process.pid}")
    if CRASHES and os.geteuid() == 0:
        await Network(["one"]).start()
        mount = folder / "data-0" / "alloc" / "an-id" / "secrets"
        mount.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", mount], check=True)
    yield process
    note("server ends")
    if STUCK:
        await asyncio.Event().wait()
    await asyncio.sleep(1.0)  # longer than xdist waits
    await process.terminate()
    note("server ended")

@pytest_asyncio.fixture
async def client(server):
    yield
    note("client ended")

@pytest.mark.parametrize("number", range(8))
async def test_it(client, number):
    note("runs")
    if CRASHES:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if not SWALLOWS:
            raise
    finally:
        note("test ended")
"""

WORKERS = ("gw0", "gw1")


class Run:
    """pytest with two workers, each of which runs one test, in its own process group."""

    def __init__(
        self,
        folder: Path,
        *,
        stuck: bool = False,
        crashes: bool = False,
        swallows: bool = False,
        tear_down_s: float = 60.0,
    ) -> None:
        self.folder = folder
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
        modes = f"STUCK, CRASHES, SWALLOWS = {stuck}, {crashes}, {swallows}\n"
        (folder / "test_it.py").write_text(modes + TESTS)
        argv = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:hypothesispytest",
        ]
        argv += ["-n2", "--dist=loadgroup", "--max-worker-restart=0", f"--basetemp={folder}/run"]
        env = dict(os.environ) | {"TEAR_DOWN_S": str(tear_down_s)}
        self.process = Process.start([*argv, str(folder)], log=folder / "out", env=env)

    def wait_for(self, note: str) -> None:
        """Wait until each worker has recorded this."""
        until(lambda: all(note in self.notes(worker) for worker in WORKERS), f"{note}\n{self.out}")

    def notes(self, worker: str) -> list[str]:
        file = self.folder / f"{worker}.notes"
        return file.read_text().split("\n") if file.exists() else []

    def wait(self) -> int:
        until(lambda: self.process.returncode is not None, f"an end\n{self.out}")
        code = self.process.returncode
        assert code is not None
        return code

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    def servers(self) -> list[int]:
        """The pids of the servers that were started and have not ended."""
        noted = [note for worker in WORKERS for note in self.notes(worker)]
        pids = [int(note.removeprefix("pid ")) for note in noted if note.startswith("pid ")]
        return [pid for pid in pids if runs(pid)]


def runs(pid: int) -> bool:
    """Whether it has not ended; a process that ended but was not waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(test: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 90.0
    while not test():
        assert time.monotonic() < deadline, f"did not see: {what}"
        time.sleep(0.02)  # polls


@pytest.fixture
def ended() -> Iterator[list[Run]]:
    """Runs that are ended with everything that they started, even if a test fails."""
    runs: list[Run] = []
    yield runs
    for run in runs:
        if run.process.returncode is None:
            run.process.send(signal.SIGKILL)
        for pid in run.servers():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow_because("starts two workers, and their tear-down takes longer than xdist waits")
@pytest.mark.parametrize(
    ("number", "whom", "swallows"),
    [
        (signal.SIGINT, "main", False),
        (signal.SIGINT, "group", False),
        (signal.SIGTERM, "main", False),
        (signal.SIGINT, "main", True),
    ],
)
def test_an_interrupted_run_tears_down_in_order(
    tmp_path: Path, ended: list[Run], number: signal.Signals, whom: str, swallows: bool
) -> None:
    """After SIGINT or SIGTERM to the main process, or to its group as sent by a terminal, each worker has torn down its
    test, then its fixtures, and no server is left; also if the test treats the interrupt as the end of one of its own
    tasks."""
    run = Run(tmp_path, swallows=swallows)
    ended.append(run)
    run.wait_for("runs")
    if whom == "main":
        os.kill(run.process.pid, number)
    else:
        os.killpg(run.process.pid, number)
    assert run.wait() == pytest.ExitCode.INTERRUPTED, run.out
    assert run.servers() == []
    for worker in WORKERS:
        order = ["runs", "test ended", "client ended", "server ends", "server ended", ""]
        assert run.notes(worker)[1:] == order, run.out
    assert "left behind" not in run.out


@pytest.mark.slow_because("starts pytest with two workers")
def test_a_second_interrupt_ends_everything_at_once(tmp_path: Path, ended: list[Run]) -> None:
    """If a tear-down hangs, a second Ctrl-C ends the run, and servers that ignore SIGTERM."""
    run = Run(tmp_path, stuck=True)
    ended.append(run)
    run.wait_for("runs")
    os.kill(run.process.pid, signal.SIGINT)
    run.wait_for("server ends")
    assert len(run.servers()) == len(WORKERS)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == pytest.ExitCode.INTERRUPTED, run.out
    assert run.servers() == []


@pytest.mark.slow_because("starts pytest with two workers")
def test_a_tear_down_has_a_time_limit(tmp_path: Path, ended: list[Run]) -> None:
    """A tear-down that hangs is abandoned, and the servers are ended without it."""
    run = Run(tmp_path, stuck=True, tear_down_s=0.5)
    ended.append(run)
    run.wait_for("runs")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == pytest.ExitCode.INTERRUPTED, run.out
    assert run.servers() == []
    assert "processes that tests have left behind" in run.out


@pytest.mark.slow_because("starts pytest with two workers")
def test_what_a_crashed_worker_leaves_is_removed(tmp_path: Path, ended: list[Run]) -> None:
    """After a run whose workers were killed none of their servers is left, and, if root runs it, no mount and no
    network namespace."""
    before = namespaces()
    run = Run(tmp_path, crashes=True)
    ended.append(run)
    run.wait_for("runs")
    assert run.wait() != 0
    assert run.servers() == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert not {name for name in namespaces() - before if name.endswith("-one")}, run.out


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=False).stdout
    return {line.split()[0] for line in listed.splitlines()}
