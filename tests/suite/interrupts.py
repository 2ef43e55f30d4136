"""Ctrl-C on a run with pytest-xdist shuts down everything that its tests have started.

pytest-xdist by itself kills its workers ten seconds after the run was interrupted: servers, mounts and network
namespaces of their fixtures stay. Here SIGINT or SIGTERM to the main process interrupts each worker once, and each
gets `TEAR_DOWN_S` to tear its fixtures down. What is left after that, or after a worker that crashed, is ended by
its pid. A second signal kills the workers, and ends what they started, immediately.

The workers are in process groups of their own, so that Ctrl-C in a terminal reaches only the main process: a
worker that is interrupted twice would abort its tear-down. If the main process is killed, execnet interrupts
the workers five seconds later, and ends them after another ten.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

TEAR_DOWN_S = 60.0
"""Stopping a Nomad with jobs takes up to 35 s."""
END_S = 5.0
"""Time between SIGTERM and SIGKILL for processes that are left."""
_KILL_S: Final = 10.0
"""Time between SIGKILL and the end of those processes."""
_POLL_S: Final = 0.05
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_PROC: Final = Path("/proc")
_NOMAD: Final = re.compile(r"(.+?)/data-\d+/")
"""A mount point of a Nomad client; the group is the folder of its `NomadServer`."""


def pytest_configure(config: pytest.Config) -> None:
    """Enable SIGINT: a shell starts background processes with SIGINT ignored, and their children inherit that, so that
    no test of Ctrl-C could pass."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        os.setpgid(0, 0)
        config.pluginmanager.register(Worker())
    elif config.getoption("numprocesses", None):
        config.pluginmanager.register(Interrupts(config))


class Worker:
    """The hooks of a worker. The main process sends it SIGUSR1, which acts as SIGINT, and more: if a test continues
    because it expects tasks to be cancelled, no further test is started."""

    def __init__(self) -> None:
        self._interrupted = False
        signal.signal(signal.SIGUSR1, self._interrupt)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupted = True
        os.kill(os.getpid(), signal.SIGINT)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        result = yield
        if self._interrupted:
            raise KeyboardInterrupt
        return result


class Interrupts:
    """The hooks of the main process."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._nodes: list[Any] = []
        """xdist's WorkerControllers."""
        self._signals = 0
        self._finishing = False
        self._before: dict[int, Any] = {}

    @pytest.hookimpl(tryfirst=True)  # before the workers are started
    def pytest_sessionstart(self) -> None:
        self._before = {number: signal.signal(number, self._signalled) for number in _SIGNALS}

    def pytest_unconfigure(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        self._nodes.append(node)

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self._kill_workers()
        if not self._finishing:
            raise KeyboardInterrupt

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Let the workers tear down before xdist ends them; then end what is left."""
        self._finishing = True
        if self._running():
            self._say("ending the servers of all workers; Ctrl-C again kills them")
            for worker in self._running():
                worker.send_signal(signal.SIGUSR1)
            deadline = time.monotonic() + TEAR_DOWN_S
            while self._running() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            self._kill_workers()
        try:
            return (yield)
        finally:
            self._end_leftovers()

    def _running(self) -> list[subprocess.Popen[bytes]]:
        """The workers that have not completed their tear-down."""
        return [
            _process(node)
            for node in self._nodes
            if not node._down and _process(node).poll() is None
        ]

    def _kill_workers(self) -> None:
        for worker in self._running():
            worker.kill()

    def _end_leftovers(self) -> None:
        if not self._nodes:
            return
        run = f"PYTEST_XDIST_TESTRUNUID={self._nodes[0].workerinput['testrunuid']}".encode()
        folder = self._config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        ended = end_processes(run, folder, 0.0 if self._signals > 1 else END_S)
        if ended:
            self._say(f"ended {len(ended)} processes that tests have left behind:")
            for pid, command in ended.items():
                self._say(f"  {pid}: {command}")
        remove_mounts(folder)
        remove_namespaces(_process(node).pid for node in self._nodes)

    def _say(self, text: str) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(text)


def _process(node: Any) -> subprocess.Popen[bytes]:
    process: subprocess.Popen[bytes] = node.gateway._io.popen
    return process


def end_processes(run: bytes, folder: Path, grace_s: float) -> dict[int, str]:
    """End the processes that have the variable `run` ("NAME=value") in their environment, or one that names a path
    below `folder`, the youngest first: SIGTERM, and SIGKILL after grace_s. Returns their pids and command lines."""
    ended: dict[int, str] = {}
    number, deadline = signal.SIGTERM, time.monotonic() + grace_s
    while True:
        if grace_s == 0.0 or time.monotonic() > deadline:
            number = signal.SIGKILL
        left = _marked(run, folder)
        if not left or time.monotonic() > deadline + _KILL_S:
            return ended
        named = {pid: _command(pid, folder) for pid in left if pid not in ended}
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if number == signal.SIGKILL or pid not in ended:
                    os.kill(pid, signal.SIGCONT)  # a stopped process would not get the SIGTERM
                    os.kill(pid, number)
        ended.update(named)
        _await_one(left[0])


def _marked(run: bytes, folder: Path) -> list[int]:
    below = f"{folder}/".encode()
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            began = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
        except OSError:
            continue
        paths = (one.partition(b"=")[2] for one in environment if b"PWD=" not in one)
        if run in environment or any(path.startswith(below) for path in paths):
            found.append((began, int(entry.name)))
    return [pid for _, pid in sorted(found, reverse=True)]


def _command(pid: int, folder: Path) -> str:
    """The command line, and the path below `folder` that its environment names: the test's own folder."""
    try:
        argv = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ")
        environment = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return "ended"
    paths = (one.partition(b"=")[2] for one in environment if b"PWD=" not in one)
    path = next((one for one in paths if one.startswith(f"{folder}/".encode())), b"")
    return f"{argv.decode(errors='replace')[:200]} {path.decode(errors='replace')}"


def _await_one(pid: int) -> None:
    """Wait until this process has ended, for at most one poll interval."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([handle], [], [], _POLL_S)
    finally:
        os.close(handle)


def remove_mounts(folder: Path) -> None:
    """Clean up after each Nomad that has mounts below this folder."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").split("\n")
    except OSError:  # not Linux
        return
    points = (line.split()[1].replace("\\040", " ") for line in mounts if line)
    below = [one for one in points if one.startswith(f"{folder}/")]
    if not below:
        return
    from servers.nomad import clean_up

    for server in {match[1] for one in below if (match := _NOMAD.match(one))}:
        clean_up(Path(server))


def remove_namespaces(pids: Iterable[int]) -> None:
    """Remove the network namespaces that a `Network` in these processes has created."""
    for pid in pids:
        for entry in Path("/run/netns").glob(f"nwd-{pid:x}????-*"):
            argv = ["ip", "netns", "delete", entry.name]
            subprocess.run(argv, check=False, capture_output=True, timeout=10)
