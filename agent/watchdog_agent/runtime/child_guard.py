"""Programs that end with the agent, even if it is killed by SIGKILL. Loaded with the first command.

A small shell starts the program, after forking a guard into the same process group. The guard reads from a pipe
whose other end only the agent holds. A line releases the guard; an EOF without one means that the agent is dead,
so the guard kills the group, including itself. Without /bin/sh, as in an image without a shell, programs run
unguarded.
"""

from __future__ import annotations

import errno
import io
import os

from watchdog_agent.runtime.loop import READ
from watchdog_agent.runtime.stdlib_light import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from watchdog_agent.runtime.loop import Loop

SHELL: Final = "/bin/sh"
SCRIPT: Final = '{ read -r x <&3 || kill -9 0; } >/dev/null 2>&1 & exec "$@" 3<&-'
WORD: Final = 3
"""The descriptor that the guard reads; the program does not get it."""

POLL_S: Final = 0.05
"""Interval in seconds for polling the program's end without a pidfd."""

_left: list[int] = []
"""Process groups that may still have had processes when their leader was reaped."""


class GuardedProcess:
    """A program in its own process group. Raises OSError if it cannot be started, and ValueError if an
    argument or a variable contains a null character."""

    def __init__(
        self, argv: list[str], environ: dict[str, str], actions: list[tuple[Any, ...]]
    ) -> None:
        """`actions`: file actions of `os.posix_spawn`, for descriptors 0 to 2."""
        bury()
        self.word = -1
        self._forget: Callable[[], None] | None = None
        # The shell would report a missing program only as text and an exit code.
        program = find(argv[0])
        read = -1
        if os.access(SHELL, os.X_OK):
            read, self.word = os.pipe2(os.O_CLOEXEC)
            if read == WORD:
                # Duplicated onto itself, it would still be closed on exec.
                read = os.dup(WORD)
                os.close(WORD)
            actions = [*actions, (os.POSIX_SPAWN_DUP2, read, WORD)]
            program, argv = SHELL, ["guard", "-c", SCRIPT, argv[0], *argv]
        try:
            # Reset signals that Python (SIGPIPE), a zygote or a scheduler ignores; the program must not inherit that.
            self.pid = os.posix_spawn(
                program,
                argv,
                environ,
                file_actions=actions,
                setpgroup=0,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGTERM, signal.SIGINT),
            )
        except BaseException:
            self._close()
            raise
        finally:
            if read >= 0:
                os.close(read)

    def _close(self) -> None:
        word, self.word = self.word, -1
        if word >= 0:
            os.close(word)

    def watch(self, loop: Loop, ended: Callable[[], None]) -> None:
        """Call back once from the loop when it has ended and can be reaped, unless it is reaped earlier."""

        def look(_mask: int = 0) -> None:
            self._unwatch()
            if not self.pid:
                return
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, self.pid, flags) is None:
                loop.later(POLL_S, look)
            else:
                ended()

        try:
            # One descriptor in the loop instead of a signal handler or a thread.
            file = io.FileIO(os.pidfd_open(self.pid), "rb")
        except (OSError, AttributeError):
            # Linux before 5.3, or a Python built on one.
            loop.later(POLL_S, look)
        else:
            loop.watch(file, READ, look)
            self._forget = lambda: loop.forget(file)

    def _unwatch(self) -> None:
        forget, self._forget = self._forget, None
        if forget is not None:
            forget()

    def kill(self) -> None:
        """Kill its whole process group."""
        if self.pid:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except OSError:
                pass

    def reap(self, options: int = 0) -> int | None:
        """Return its status, as from `os.waitpid`, and release the guard; None if `options` is os.WNOHANG and it is
        running. The rest of its group keeps running, unless it was killed before."""
        done, status = os.waitpid(self.pid, options)
        if not done:
            return None
        try:
            os.write(self.word, b"\n")
        except OSError:
            pass  # no guard, or a dead one
        self._close()
        self._unwatch()
        _left.append(self.pid)
        self.pid = 0
        bury()
        return status


def bury() -> None:
    """Reap orphans that became children of this process, which happens if it is process 1."""
    for group in list(_left):
        try:
            while (found := os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG)) is not None:
                del found
        except ChildProcessError:
            _left.remove(group)


def find(name: str) -> str:
    """The path of a program, searched like in a shell. Raises OSError if it is not found, and ValueError for a
    name that contains a null character."""
    if "\0" in name:
        raise ValueError("a name can't hold a null character")
    places = [name] if "/" in name else [f"{one}/{name}" for one in os.get_exec_path()]
    code = errno.ENOENT
    for place in places:
        if os.path.isfile(place):
            if os.access(place, os.X_OK):
                return place
            code = errno.EACCES
        elif os.path.isdir(place) and "/" in name:
            code = errno.EACCES
    raise OSError(code, "")
