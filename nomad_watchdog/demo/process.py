"""A child process with a log file, in its own process group.

It uses `subprocess.Popen`, not asyncio's, because a server of a test session is started in one event loop and stopped,
paused or killed from another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import random
import signal
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from nomad_watchdog import private_files
from nomad_watchdog.errors import TerminalError, TransientError

_POLL_S: Final = 0.02
_PORTS: Final = range(20_000, 32_000)
"""Below Linux's ephemeral ports (32768 and up), so that no outgoing connection takes a port between the check and the
server's bind."""
_handed_out: Final[set[int]] = set()
_ports_lock: Final = threading.Lock()


def free_port() -> int:
    """A port that is free on 127.0.0.1 for TCP and UDP. This function never returns it again in this process, nor in
    another process of this user while this one runs.

    Raises TransientError when none is found in 1,000 tries.
    """
    chooser = random.SystemRandom()
    with _ports_lock:
        for _ in range(1000):
            port = chooser.choice(_PORTS)
            if port not in _handed_out and _claimed(port) and _is_free(port):
                _handed_out.add(port)
                return port
    raise TransientError(f"no free port between {_PORTS.start} and {_PORTS.stop} on 127.0.0.1")


def take_block(blocks: Sequence[int]) -> int:
    """Reserve the first of these numbers that no process of this user has reserved, until `give_back` or the end of
    this process. If all are reserved, return any. Each number stands for a block of ports of another program."""
    with _ports_lock:
        for block in blocks:
            if block not in _handed_out and _claimed(block):
                _handed_out.add(block)
                return block
    return random.SystemRandom().choice(blocks)


def give_back(block: int) -> None:
    """Release a number that `take_block` returned."""
    with _ports_lock:
        _handed_out.discard(block)
        claims = _claims()
        if claims is not None:
            fcntl.lockf(claims, fcntl.LOCK_UN, 1, block)


def _claimed(port: int) -> bool:
    """Lock one byte of a file that all processes of this user share. The kernel unlocks it when this process ends."""
    claims = _claims()
    if claims is None:
        return True
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@functools.cache
def _claims() -> int | None:
    """The file stays open as long as this process runs, because closing any descriptor of it would release all of its
    locks. None if the cache is not writable."""
    folder = cache_folder()
    try:
        private_files.folder(folder)
        return os.open(folder / "ports.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _is_free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


def clean_environment() -> dict[str, str]:
    """The environment without variables that would make a child use a real cluster."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NOMAD_", "CONSUL_", "KUBE")) and name != "AWS_CA_BUNDLE"
    }


class Running(ABC):
    """``async with server: …`` starts it, and stops it at the end, also when the start fails or is cancelled, so that no
    process is left."""

    @abstractmethod
    async def start(self) -> None:
        """Start, and wait until it serves."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop gracefully. Idempotent, also after a failed start."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.stop()


class Process:
    """A child process. Signals go to its pid, and to its whole group only to clean up."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._popen = popen

    @classmethod
    def start(
        cls,
        argv: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: int | None = None,
    ) -> Process:
        """Start argv with both outputs appended to log. `env`: None = the environment of this process. `user`: run it
        as this uid (needs root).

        Raises TerminalError when the program cannot be started.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        name = Path(argv[0]).name
        with log.open("ab") as out:
            try:
                popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=None if env is None else dict(env),
                    cwd=cwd,
                    process_group=0,
                    user=user,
                    group=user,
                    extra_groups=None if user is None else [],
                )
            except OSError as error:
                raise TerminalError(f"cannot start {name}: {error.strerror}") from error
        return cls(name, popen, log)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; the negative number of a signal that ended it."""
        return self._popen.poll()

    def send(self, number: signal.Signals) -> None:
        """Signal the process itself. No effect when it has ended. With SIGSTOP, wait until it has stopped with all its
        threads, because a running one could still answer a call."""
        self._popen.send_signal(number)
        if number == signal.SIGSTOP and self._popen.returncode is None:
            os.waitid(os.P_PID, self._popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    async def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its return code. Raises TimeoutError when it still runs after timeout_s."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (code := self._popen.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"{self.name} (pid {self.pid}) still runs after {timeout_s} s")
            await asyncio.sleep(_POLL_S)
        return code

    async def terminate(self, grace_s: float = 10.0) -> int:
        """Send SIGTERM, after grace_s SIGKILL; then kill the rest of its group. Idempotent."""
        if self._popen.poll() is None:
            self.send(signal.SIGCONT)  # a paused process would not receive the SIGTERM
            self.send(signal.SIGTERM)
            try:
                await self.wait(grace_s)
            except TimeoutError:
                self.send(signal.SIGKILL)
        code = await self.wait()
        self._kill_group()
        return code

    async def kill(self) -> int:
        """Send SIGKILL, as in a crash. Children of the process keep running."""
        self.send(signal.SIGKILL)
        return await self.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the log (of its last 16 KiB), for an error message."""
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - 16_384))
            return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])


class ServerProcess(Running):
    """A server that is one process, with its own folder."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._process: Process | None = None

    def _launch(self, argv: Sequence[str], log: str) -> Process:
        """Start it with both outputs in the file `log` of the folder. Raises as `Process.start`."""
        self._process = Process.start(argv, log=self.data_dir / log, env=clean_environment())
        return self._process

    async def stop(self) -> None:
        """Stop gracefully. Idempotent."""
        if self._process is not None:
            await self._process.terminate()
            self._process = None


def cache_folder() -> Path:
    """``$NOMAD_WATCHDOG_CACHE``, else ``$XDG_CACHE_HOME/nomad-watchdog``, else under ``~/.cache``."""
    if own := os.environ.get("NOMAD_WATCHDOG_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nomad-watchdog"
