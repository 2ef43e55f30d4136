"""Starts local agents: forked from a zygote process, or spawned as plain processes if that fails.

A forked agent shares the modules that the zygote has imported (`watchdog_agent.zygote`), so less than half of its
memory is private. The zygote is optional: if it is dead, hangs or cannot be started, agents are spawned as plain
processes. Agents that it has forked keep running.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.schedulers.agent_zipapp import Installed
from nomad_watchdog.schedulers.local import process

log = logging.getLogger(__name__)

_BOOT: Final = """\
import sys
try:
    import watchdog_agent
except ImportError:  # it is installed in site-packages
    import site
    site.main()
from watchdog_agent import zygote
zygote.run(int(sys.argv[1]))
"""
"""Modules of installed packages would be in the memory of each agent, so `site` is loaded only if necessary."""
_START_S: Final = 15.0
_ANSWER_S: Final = 5.0
"""Timeout of a request to the zygote. A fork takes a millisecond."""
_RETRY_S: Final = 60.0
"""Pause before another zygote is started after one could not be started."""


class ChangedError(Exception):
    """The agent's files have changed since the start of the control plane."""


class ZygoteError(Exception):
    """The zygote failed."""


@dataclass(frozen=True, slots=True)
class StartedAgent:
    pid: int
    parent: int
    """The process that can read its exit code."""


class Parents:
    """Starts agents and reads their exit codes. Blocking; any thread may call."""

    def __init__(self, *, python: str, directory: Path, fork: bool) -> None:
        self._python = python
        self._directory = directory
        self._fork = fork
        self._installed = Installed()
        self._lock = threading.Lock()
        self._zygote: _Zygote | None = None
        self._not_before = 0.0
        self._closed = False

    def spawn(
        self, home: Path, argv: list[str], environment: Mapping[str, str], *, ours: bool
    ) -> StartedAgent:
        """Start an agent that holds the device's lock. `ours`: argv is this project's agent, so it can be forked.

        Raises BlockingIOError when a process of this device still holds the lock, and ChangedError."""
        if ours and (problem := self._installed.problem()):
            raise ChangedError(problem)
        if ours and self._fork:
            try:
                with self._lock:
                    zygote = self._open_zygote(environment)
                    if zygote is not None:
                        return StartedAgent(zygote.start(home, environment), zygote.pid)
            except ZygoteError as error:
                log.warning("agent is spawned, not forked", extra={"reason": str(error)})
        return StartedAgent(process.spawn(home, argv, environment), os.getpid())

    def exit_code(self, pid: int) -> int | None:
        """As `process.exit_code`, also for forked agents."""
        code = process.exit_code(pid)
        if code is None and self._zygote is not None:
            with suppress(ZygoteError), self._lock:
                if self._zygote is not None:
                    found = self._zygote.request({"do": "ended", "pid": pid}).get("code")
                    return found if isinstance(found, int) else None
        return code

    def reap(self, pid: int) -> None:
        """Reap a dead agent. No effect for other processes."""
        process.reap(pid)
        if self._zygote is not None:
            with suppress(ZygoteError), self._lock:
                if self._zygote is not None:
                    self._zygote.request({"do": "bury", "pid": pid})

    def include(self, parent: int) -> bool:
        """Whether this parent is this process or its zygote, so that no other process knows the exit code."""
        zygote = self._zygote
        return parent == os.getpid() or (zygote is not None and zygote.pid == parent)

    def close(self) -> None:
        """End the zygote. Its agents keep running."""
        with self._lock:
            self._closed = True
            if self._zygote is not None:
                self._zygote.close()
                self._zygote = None

    def _open_zygote(self, environment: Mapping[str, str]) -> _Zygote | None:
        """The zygote, a new one if necessary; None = not available now."""
        if self._zygote is not None and self._zygote.broken:
            self._zygote.close()
            self._zygote = None
        now = SystemClock().monotonic()
        if self._zygote is not None or self._closed or now < self._not_before:
            return self._zygote
        try:
            self._zygote = _Zygote(self._python, self._directory, environment)
        except (ZygoteError, OSError) as error:
            self._not_before = now + _RETRY_S
            raise ZygoteError(f"no zygote for {_RETRY_S:g} s: {error}") from error
        return self._zygote


class _Zygote:
    """One zygote process and the socket to it. Not thread-safe."""

    def __init__(self, python: str, directory: Path, environment: Mapping[str, str]) -> None:
        """Raises OSError, or ZygoteError when it does not report that it has started."""
        self.broken = False
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        others = {k: v for k, v in environment.items() if not k.startswith("WATCHDOG_")}
        output = os.open(
            directory / "zygote.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        try:
            self._process = subprocess.Popen(
                [python, "-P", "-S", "-c", _BOOT, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env=others,
                start_new_session=True,
            )
        except OSError:
            self._channel.close()
            raise
        finally:
            theirs.close()
            os.close(output)
        try:
            self._answer(_START_S)
        except ZygoteError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, home: Path, environment: Mapping[str, str]) -> int:
        """Fork an agent and return its pid. Raises BlockingIOError as `process.spawn` does."""
        request = {"do": "start", "env": dict(environment), "name": home.name}
        with process.device_lock(home) as lock:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            output = os.open(home / "agent.log", flags, 0o600)
            try:
                answer = self.request(request, [output, lock])
            finally:
                os.close(output)
        pid = answer.get("pid")
        if not isinstance(pid, int):
            raise ZygoteError(str(answer.get("error", "an answer without a pid")))
        return pid

    def request(
        self, request: Mapping[str, object], descriptors: list[int] | None = None
    ) -> Mapping[str, object]:
        """Send a request and return its answer. After a failure the zygote is not used again."""
        if self.broken:
            raise ZygoteError("the zygote is dead")
        try:
            self._channel.settimeout(_ANSWER_S)
            socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors or [])
        except OSError as error:
            self.broken = True
            raise ZygoteError(f"the request to the zygote failed: {error}") from error
        return self._answer(_ANSWER_S)

    def _answer(self, within_s: float) -> Mapping[str, object]:
        try:
            self._channel.settimeout(within_s)
            data = self._channel.recv(4096)
            if data:
                answer = loads(data)
                return answer if isinstance(answer, dict) else {}
        except (OSError, ValueError) as error:
            self.broken = True
            raise ZygoteError(f"the zygote does not answer: {error}") from error
        self.broken = True
        raise ZygoteError("the zygote has ended; see zygote.log")

    def close(self) -> None:
        """Close the socket, which ends the zygote. One that hangs is killed."""
        self._channel.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
