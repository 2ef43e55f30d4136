"""Fails a test that leaves a task, a thread, a child process or a socket behind.

Exempt is what exists before a test, and what a fixture of a wider scope starts during it. Everything else has
`GRACE_S` to end. Tasks are checked in the test's own event loop before that is closed; everything else after the
last fixture has been torn down.

Processes and sockets are read from /proc: on systems other than Linux only tasks and threads are checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import pytest_asyncio

GRACE_S = 5.0
_POLL_S: Final = 0.02
_PROC: Final = Path("/proc")
_ENDED: Final = "ended, but not waited for"


@dataclass(slots=True)
class _Present:
    """What exists at one moment."""

    threads: set[threading.Thread] = field(default_factory=set)
    processes: set[int] = field(default_factory=set)
    sockets: set[str] = field(default_factory=set)
    """Inode names of our open sockets, such as ``socket:[4711]``."""

    @classmethod
    def now(cls) -> _Present:
        return cls(set(threading.enumerate()), _all_processes(), set(_sockets()))

    def __or__(self, other: _Present) -> _Present:
        return _Present(
            self.threads | other.threads,
            self.processes | other.processes,
            self.sockets | other.sockets,
        )

    def __sub__(self, other: _Present) -> _Present:
        return _Present(
            self.threads - other.threads,
            self.processes - other.processes,
            self.sockets - other.sockets,
        )


class Leftovers:
    """The hooks; registered by `tests.conftest`."""

    def __init__(self) -> None:
        self._exempt = _Present()
        self._servers: set[str] = set()
        """Commands of the exempt children: a test that kills a session server starts it again."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        self._exempt = _Present.now()
        self._servers = _commands_of_children()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        before = _Present.now()
        try:
            return (yield)
        finally:
            self._exempt |= _Present.now() - before
            self._servers |= _commands_of_children()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        if left := self._left_by(item):
            pytest.fail("left behind by this test: " + "; ".join(left), pytrace=False)
        return result

    def _left_by(self, item: pytest.Item) -> list[str]:
        deadline = time.monotonic() + GRACE_S
        new = _Present.now() - self._exempt
        # a closed loop waits for the threads of its executor: those that are left belong to a running loop
        new.threads = {one for one in new.threads if not one.name.startswith("asyncio_")}
        for thread in new.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        new.processes = {pid for pid in new.processes if _command(pid) not in self._servers}
        processes = _await_end(self._of_test(new.processes, item), deadline)
        sockets = set(_sockets()) - self._exempt.sockets
        if sockets:
            gc.collect()  # what only a reference cycle keeps open is reported as a ResourceWarning
        while sockets and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # a thread that existed before may be about to close it
            sockets &= set(_sockets())
        return [
            *(f"thread {thread.name}" for thread in new.threads if thread.is_alive()),
            *(f"process {pid} ({_command(pid)})" for pid in sorted(processes)),
            *(_described(inode, fd) for inode, fd in _sockets().items() if inode in sockets),
        ]

    def _of_test(self, pids: Iterable[int], item: pytest.Item) -> set[int]:
        """Child processes among `pids`, and orphans that this test started: pytest names it in their environment."""
        mark = f"PYTEST_CURRENT_TEST={item.nodeid} (".encode()
        return {
            pid
            for pid in pids
            if _parent(pid) == os.getpid()
            or (mark in _environment(pid) and not self._below_exempt(pid))
        }

    def _below_exempt(self, pid: int) -> bool:
        """Whether it was started by a process that stays, such as a session server."""
        while (pid := _parent(pid)) > 1 and pid != os.getpid():
            if pid in self._exempt.processes:
                return True
        return False


def _all_processes() -> set[int]:
    if not _PROC.is_dir():
        return set()
    return {int(name) for name in os.listdir(_PROC) if name.isdigit()}


def _commands_of_children() -> set[str]:
    """Commands of all children, whichever thread started them."""
    children: set[int] = set()
    for thread in (_PROC / "self" / "task").glob("*/children"):
        with contextlib.suppress(OSError):  # that thread has ended
            children |= {int(pid) for pid in thread.read_text().split()}
    return {_command(pid) for pid in children} - {_ENDED}


def _sockets() -> dict[str, int]:
    """Name → file descriptor."""
    found = {}
    folder = "/proc/self/fd"
    for name in os.listdir(folder) if _PROC.is_dir() else ():
        with contextlib.suppress(OSError):  # that of the listing itself is closed again
            target = os.readlink(f"{folder}/{name}")
            if target.startswith("socket:"):
                found[target] = int(name)
    return found


def _parent(pid: int) -> int:
    """Parent pid; 0 if the process has ended."""
    try:
        return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _environment(pid: int) -> bytes:
    try:
        return (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return b""


def _command(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    return b" ".join(words).decode(errors="replace").strip()


def _await_end(pids: set[int], deadline: float) -> set[int]:
    """The processes that have not ended by the deadline. One that ended but was not waited for does not count."""
    left = set()
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            waiter = select.poll()
            waiter.register(handle, select.POLLIN)
            ended = waiter.poll(max(0.0, deadline - time.monotonic()) * 1000)
        finally:
            os.close(handle)
        if not ended:
            left.add(pid)
    return left


def _described(inode: str, fd: int) -> str:
    try:
        with socket.socket(fileno=os.dup(fd)) as it:
            peer = ""
            with contextlib.suppress(OSError):
                peer = f" to {it.getpeername()}"
            return f"{inode} {it.family.name} {it.type.name} {it.getsockname()}{peer}"
    except OSError:
        return inode


def _no_task_left(scope: Literal["function", "module", "session"]) -> Any:
    """A fixture in the event loop of this scope."""

    @pytest_asyncio.fixture(loop_scope=scope, name=f"no_{scope}_task_left")
    async def check() -> AsyncIterator[None]:
        before, sockets = asyncio.all_tasks(), set(_sockets())
        yield
        # something just closed, such as the connection of an aborted stream, ends in later turns of this loop
        deadline = time.monotonic() + GRACE_S
        while set(_sockets()) - sockets and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        if left:
            _, left = await asyncio.wait(left, timeout=GRACE_S)
        if left:
            names = "; ".join(sorted(repr(task) for task in left))
            pytest.fail(f"left behind by this test: {names}", pytrace=False)

    return check


no_function_task_left = _no_task_left("function")
no_module_task_left = _no_task_left("module")
no_session_task_left = _no_task_left("session")


def check_tasks(item: pytest.Item) -> None:
    """Make a test fail that leaves a task behind in its event loop."""
    if not (isinstance(item, pytest.Function) and pytest_asyncio.is_async_test(item)):
        return
    mark = item.get_closest_marker("asyncio")
    scope = mark.kwargs.get("loop_scope", "function") if mark else "function"
    name = f"no_{scope}_task_left"
    if name not in item.fixturenames:
        # before the test's own fixtures, so that it is torn down after them
        known = item._fixtureinfo.name2fixturedefs
        wider = [n for n in item.fixturenames if n in known and known[n][-1].scope != "function"]
        item.fixturenames.insert(len(wider), name)
