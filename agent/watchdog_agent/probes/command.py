"""Runs a program on the agent's host; exit code 0 is success. No shell; only the event loop waits for it."""

from __future__ import annotations

import io
import os

from watchdog_agent.config import optional_table, validators
from watchdog_agent.runtime import child_guard, http, outcome
from watchdog_agent.runtime.loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Document, Ended, Probe

MAX_OUTPUT = 1 << 20
"""Maximum output in bytes; a program that writes more is killed."""
KEPT = 4096
"""Number of bytes kept from the end of the output."""
CHUNK = 16384
PIPE = 65536
"""Capacity of a pipe on Linux, in bytes."""
PASSED_ON = ("PATH", "HOME", "LANG", "TZ")
"""The only variables passed on from the agent's environment, which contains tokens (S10)."""

_running: set[_Command] = set()
"""All runs that are not reaped yet, including killed ones."""


def check(probe: Document, where: str) -> None:
    """Check the settings. Raises ConfigError."""
    validators.require(probe, "command", optional_table.COMMAND, where)


def start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Run the program with the device's address in WATCHDOG_ADDRESS."""
    environ = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environ["WATCHDOG_ADDRESS"] = address
    if any(one.argv is spec["command"] and one.ended is None for one in _running):
        # At most one unreaped process per probe, not one per run: a hanging file system may hang for days.
        hangs = outcome.Unable("its last run was killed and hangs in the kernel")
        loop.later(0, lambda: ended(False, hangs))
        return
    try:
        _Command(loop, spec["command"], environ, spec["timeout_s"], ended)
    except (OSError, ValueError) as error:
        text = http.reason_of(error) if isinstance(error, OSError) else str(error)
        why = outcome.Unable(f"{spec['command'][0]}: {text}")
        loop.later(0, lambda: ended(False, why))


def close() -> None:
    """Kill all running programs, because the agent is about to exit."""
    for command in list(_running):
        command.kill()


class _Command:
    """One run. Raises OSError if it cannot be started."""

    def __init__(
        self, loop: Loop, argv: list[str], environ: dict[str, str], timeout_s: float, ended: Ended
    ) -> None:
        self.loop = loop
        self.argv = argv
        self.ended: Ended | None = ended
        self.output = bytearray()
        self.size = 0
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.set_blocking(write, True)
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, write, 1),
                (os.POSIX_SPAWN_DUP2, write, 2),
            ]
            # In its own process group, so that its children end with it.
            self.program = child_guard.GuardedProcess(argv, environ, actions)
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        _running.add(self)
        self.pipe: io.FileIO | None = io.FileIO(read, "rb")
        self.timer = loop.later(
            timeout_s, lambda: self._end(False, f"not finished within {timeout_s:g} s")
        )
        loop.watch(self.pipe, READ, self._read)
        self.program.watch(loop, self._exited)

    def _read(self, _mask: int) -> None:
        assert self.pipe is not None
        data = self.pipe.read(CHUNK)
        if data is None:
            return
        self.size += len(data)
        self.output = (self.output + data)[-KEPT:]
        if not data:
            self.loop.forget(self.pipe)
            self.pipe = None
        elif self.size > MAX_OUTPUT:
            self._end(False, "it wrote more than 1 MiB")

    def _exited(self) -> None:
        # Read at most the rest of the pipe: a child of the program may keep it open forever.
        for _ in range(PIPE // CHUNK):
            if self.pipe is not None:
                self._read(0)
        ended, status = self.ended, self._reap()
        if ended is None or status is None:
            return
        code = os.waitstatus_to_exitcode(status)
        how = f"exit {code}" if code >= 0 else f"killed by signal {-code}"
        line = last_line(bytes(self.output))
        if code == 0:
            self._end(True, line or how)
        else:
            self._end(False, f"{how}: {line}" if line else how)

    def _reap(self) -> int | None:
        """Kill its group, then return its status if available. Until it is reaped, its PID cannot be reused."""
        if not self.program.pid:
            return None
        self.program.kill()
        status = self.program.reap(os.WNOHANG)
        if status is not None:
            _running.discard(self)
        return status

    def kill(self) -> None:
        """Kill it; no callback is called afterwards."""
        self.ended = None
        self._end(False, "")

    def _end(self, ok: bool, reason: str) -> None:
        self.timer[2] = None
        # A process that hangs in the kernel, such as on a dead file system, is reaped once it exits.
        self._reap()
        if self.pipe is not None:
            self.loop.forget(self.pipe)
            self.pipe = None
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(ok, reason)


def last_line(output: bytes) -> str:
    """The last non-empty line, printable characters only, at most 200 characters."""
    lines = output.decode("utf-8", "replace").strip().splitlines()
    cut = lines[-1].strip()[:200] if lines else ""
    return "".join(c if c.isprintable() else "?" for c in cut)
