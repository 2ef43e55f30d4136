"""Processes of this machine: start, tell whether it is still the same one, signal, bury."""

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
    """Whether this pid is still that process (pids are used again)."""
    return pid > 0 and started > 0 and start_time(pid) == started


def send(pid: int, started: int, number: signal.Signals) -> None:
    """Signal that very process. The descriptor is opened before the check, so reuse can't slip in."""
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
    """How a child of ours ended (-n = signal n), without burying it; None = unknown or not ours."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return None
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def reap(pid: int) -> None:
    """Reap a dead child of ours; nothing for any other process."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return


@contextmanager
def device_lock(home: Path) -> Iterator[int]:
    """A descriptor that holds the device's lock, to be handed on to its agent as descriptor 3.

    The lock is a flock on an open file that only the agent keeps: the kernel drops it when the last process
    of the agent is gone, whoever lives or dies meanwhile (S3).
    Raises BlockingIOError when a process of this device still holds it.
    """
    held = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield held
    finally:
        os.close(held)


def spawn(home: Path, argv: list[str], environment: Mapping[str, str]) -> int:
    """Start argv in a session of its own, holding the device's lock; its pid.

    Raises BlockingIOError when a process of this device still holds it.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with device_lock(home) as held:
        return os.posix_spawnp(
            argv[0],
            argv,
            dict(environment),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(home / "agent.log"), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, held, 3),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
        )


def is_locked(home: Path) -> bool:
    """Whether some process of this device's agent lives. Call it with the right to decide only."""
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
    """Pid and instance of the agent whose pid was never written down; (0, "") = none.

    It is told by its environment, or, as a forked one has its nursery's, by the lock that it holds."""
    wanted = f"WATCHDOG_STATE_DIR={home / 'state'}".encode()
    for one in Path("/proc").iterdir():
        if not one.name.isdigit():
            continue
        try:
            words = (one / "environ").read_bytes().split(b"\0")
            holds = wanted in words or _holds(one, home / "lock")
        except OSError:  # gone meanwhile, or another user's
            continue
        if holds and start_time(int(one.name)):
            facts = dict(word.partition(b"=")[::2] for word in words)
            instance = facts.get(b"WATCHDOG_INSTANCE", b"").decode(errors="replace")
            return int(one.name), instance or _instance_said(home, int(one.name))
    return 0, ""


def _holds(process: Path, lock: Path) -> bool:
    try:
        return (process / "fd" / "3").readlink() == lock
    except FileNotFoundError:
        return False


def _instance_said(home: Path, pid: int) -> str:
    """What the agent itself wrote when it began to serve; "" = nothing, or another run did."""
    try:
        said = loads((home / "state" / "agent.json").read_text())
        return str(said["instance"]) if said["pid"] == pid else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
