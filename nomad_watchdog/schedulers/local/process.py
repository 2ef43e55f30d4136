"""Processes of this machine: start, identify, signal, reap."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from watchdog_agent.runtime.parsing import loads

_ZOMBIE = {"Z", "X"}


def start_time(pid: int) -> int:
    """Clock ticks since boot at which this process started; 0 = no such process, or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = text[text.rindex(")") + 2 :].split()
    return 0 if fields[0] in _ZOMBIE else int(fields[19])


def is_same(pid: int, started: int) -> bool:
    """Whether this pid is still the same process, as pids are reused."""
    return pid > 0 and started > 0 and start_time(pid) == started


def send(pid: int, started: int, number: signal.Signals) -> None:
    """Signal exactly this process. The pidfd is opened before the check, so the pid cannot be reused in between."""
    if pid <= 0:
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if is_same(pid, started):
            signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def exit_code(pid: int) -> int | None:
    """How a child ended (-n = signal n), without reaping it; None = unknown or not a child."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return None
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def reap(pid: int) -> None:
    """Reap a dead child. No effect for other processes."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return


@contextmanager
def device_lock(home: Path) -> Iterator[int]:
    """A descriptor that holds the device's lock, to be passed to its agent as descriptor 3.

    The lock is a flock on an open file that only the agent keeps open: the kernel releases it when the last process
    of the agent has ended, whatever happens to other processes (S3).
    Raises BlockingIOError when a process of this device still holds it.
    """
    lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    finally:
        os.close(lock)


def spawn(home: Path, argv: list[str], environment: Mapping[str, str]) -> int:
    """Start argv in a new session, holding the device's lock. Returns its pid.

    Raises BlockingIOError when a process of this device still holds it.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with device_lock(home) as lock:
        return os.posix_spawnp(
            argv[0],
            argv,
            dict(environment),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(home / "agent.log"), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, lock, 3),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
        )


def is_locked(home: Path) -> bool:
    """Whether a process of this device's agent runs. Call it only while `files.exclusive` is held."""
    descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return False
    finally:
        os.close(descriptor)


def find(home: Path) -> tuple[int, str]:
    """Pid and instance of the agent whose pid was not stored; (0, "") = none.

    It is identified by its environment, or by the lock that it holds, because a forked agent has the environment of
    its zygote."""
    wanted = f"WATCHDOG_STATE_DIR={home / 'state'}".encode()
    for one in Path("/proc").iterdir():
        if not one.name.isdigit():
            continue
        try:
            words = (one / "environ").read_bytes().split(b"\0")
            holds = wanted in words or _holds(one, home / "lock")
        except OSError:  # it has ended, or belongs to another user
            continue
        if holds and start_time(int(one.name)):
            facts = dict(word.partition(b"=")[::2] for word in words)
            instance = facts.get(b"WATCHDOG_INSTANCE", b"").decode(errors="replace")
            return int(one.name), instance or _stored_instance(home, int(one.name))
    return 0, ""


def _holds(process: Path, lock: Path) -> bool:
    try:
        return (process / "fd" / "3").readlink() == lock
    except FileNotFoundError:
        return False


def _stored_instance(home: Path, pid: int) -> str:
    """The instance that the agent stored when it started to serve; "" = none, or that of another run."""
    try:
        state = loads((home / "state" / "agent.json").read_text())
        return str(state["instance"]) if state["pid"] == pid else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
