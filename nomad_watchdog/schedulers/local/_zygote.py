"""Whose children local agents are: forked by a nursery of ours, or spawned by us where that can't be.

A forked agent shares what the nursery has imported (`watchdog_agent.zygote`), so that less than
half of the memory is its own. The nursery is a convenience, never a need: when it is dead, hung or can't be started,
agents are spawned as plain processes, and those that it has forked go on, as after our own death.
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
from typing import Any, Final

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.schedulers.agent_zipapp import Installed
from nomad_watchdog.schedulers.local import process

log = logging.getLogger(__name__)

_BOOT: Final = """\
import sys
try:
    import watchdog_agent
except ImportError:  # it is installed, and not beside us
    import site
    site.main()
from watchdog_agent import zygote
zygote.run(int(sys.argv[1]))
"""
"""What the installed packages load is in the memory of each agent; those that need none go without."""
_START_S: Final = 15.0
_ANSWER_S: Final = 5.0
"""A fork takes a millisecond; one that takes this long is hung."""
_RETRY_S: Final = 60.0
"""How long no other nursery is tried after one could not be started."""


class ChangedError(Exception):
    """The agent's files are not those that the control plane started with; the text says so."""


class NurseryError(Exception):
    """The nursery does not do what it is there for; the text says what."""


@dataclass(frozen=True, slots=True)
class Born:
    pid: int
    parent: int
    """Who can tell how it ends."""


class Parents:
    """Starts agents and tells how they ended. Blocking; any thread may call."""

    def __init__(self, *, python: str, directory: Path, fork: bool) -> None:
        self._python = python
        self._directory = directory
        self._fork = fork
        self._installed = Installed()
        self._lock = threading.Lock()
        self._nursery: _Nursery | None = None
        self._not_before = 0.0
        self._closed = False

    def spawn(
        self, home: Path, argv: list[str], environment: Mapping[str, str], *, ours: bool
    ) -> Born:
        """Start an agent that holds the device's lock. `ours`: argv is our agent, so it may be forked.

        Raises BlockingIOError when a process of this device still holds the lock, and ChangedError."""
        if ours and (problem := self._installed.problem()):
            raise ChangedError(problem)
        if ours and self._fork:
            try:
                with self._lock:
                    nursery = self._there(environment)
                    if nursery is not None:
                        return Born(nursery.start(home, environment), nursery.pid)
            except NurseryError as error:
                log.warning("agent is spawned, not forked", extra={"reason": str(error)})
        return Born(process.spawn(home, argv, environment), os.getpid())

    def exit_code(self, pid: int) -> int | None:
        """As `process.exit_code`, also of what was forked for us."""
        code = process.exit_code(pid)
        if code is None and self._nursery is not None:
            with suppress(NurseryError), self._lock:
                if self._nursery is not None:
                    found = self._nursery.ask({"do": "ended", "pid": pid}).get("code")
                    return found if isinstance(found, int) else None
        return code

    def reap(self, pid: int) -> None:
        """Reap a dead agent of ours; nothing for any other process."""
        process.reap(pid)
        if self._nursery is not None:
            with suppress(NurseryError), self._lock:
                if self._nursery is not None:
                    self._nursery.ask({"do": "bury", "pid": pid})

    def are(self, parent: int) -> bool:
        """Whether this parent is us or our nursery: then nobody else knows more."""
        nursery = self._nursery
        return parent == os.getpid() or (nursery is not None and nursery.pid == parent)

    def close(self) -> None:
        """Let the nursery end; its agents go on."""
        with self._lock:
            self._closed = True
            if self._nursery is not None:
                self._nursery.close()
                self._nursery = None

    def _there(self, environment: Mapping[str, str]) -> _Nursery | None:
        """The nursery, a new one if need be; None = not now."""
        if self._nursery is not None and self._nursery.broken:
            self._nursery.close()
            self._nursery = None
        now = SystemClock().monotonic()
        if self._nursery is not None or self._closed or now < self._not_before:
            return self._nursery
        try:
            self._nursery = _Nursery(self._python, self._directory, environment)
        except (NurseryError, OSError) as error:
            self._not_before = now + _RETRY_S
            raise NurseryError(f"no nursery for {_RETRY_S:g} s: {error}") from error
        return self._nursery


class _Nursery:
    """One nursery process and the socket to it. Not for two threads at once."""

    def __init__(self, python: str, directory: Path, environment: Mapping[str, str]) -> None:
        """Raises OSError, or NurseryError when it does not say that it is there."""
        self.broken = False
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept = {k: v for k, v in environment.items() if not k.startswith("WATCHDOG_")}
        said = os.open(
            directory / "nursery.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        try:
            self._process = subprocess.Popen(
                [python, "-P", "-S", "-c", _BOOT, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[theirs.fileno()],
                env=kept,
                start_new_session=True,
            )
        except OSError:
            self._channel.close()
            raise
        finally:
            theirs.close()
            os.close(said)
        try:
            self._answer(_START_S)
        except NurseryError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, home: Path, environment: Mapping[str, str]) -> int:
        """The pid of a forked agent. Raises BlockingIOError as `process.spawn` does."""
        request = {"do": "start", "env": dict(environment), "name": home.name}
        with process.device_lock(home) as held:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            said = os.open(home / "agent.log", flags, 0o600)
            try:
                answer = self.ask(request, [said, held])
            finally:
                os.close(said)
        if "pid" not in answer:
            raise NurseryError(str(answer.get("error", "an answer without a pid")))
        return int(answer["pid"])

    def ask(self, request: Mapping[str, Any], descriptors: list[int] | None = None) -> Any:
        """One request and its answer. After a failure this nursery is not asked again."""
        if self.broken:
            raise NurseryError("the nursery is dead")
        try:
            self._channel.settimeout(_ANSWER_S)
            socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors or [])
        except OSError as error:
            self.broken = True
            raise NurseryError(f"the nursery can't be asked: {error}") from error
        return self._answer(_ANSWER_S)

    def _answer(self, within_s: float) -> Any:
        try:
            self._channel.settimeout(within_s)
            data = self._channel.recv(4096)
            if data:
                return loads(data)
        except (OSError, ValueError) as error:
            self.broken = True
            raise NurseryError(f"the nursery does not answer: {error}") from error
        self.broken = True
        raise NurseryError("the nursery has ended; see nursery.log")

    def close(self) -> None:
        """It ends when the socket does; one that hangs is killed."""
        self._channel.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
