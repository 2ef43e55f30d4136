"""The files of one local placement. They are written atomically, and checked when they are read."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog import private_files
from nomad_watchdog.errors import TransientError, UserError, WatchdogError
from nomad_watchdog.ids import Slug, parse_device_id, slug_of
from nomad_watchdog.model import PlacementState

LOG_BYTES = 1024 * 1024
"""Maximum size of a log. A larger one is copied to the one old log and truncated."""


@dataclass(frozen=True, slots=True)
class Entry:
    """placement.json. Times are wall-clock seconds, because other processes read them."""

    device_id: str
    epoch: int
    agent_class: str
    spec_hash: str
    instance: str
    argv: list[str]
    state: str
    created_at: float
    pid: int = 0
    """0 = no known process."""
    pid_start: int = 0
    """Start time of pid in clock ticks since boot, which detects reuse of the pid."""
    parent: int = 0
    parent_start: int = 0
    started_at: float = 0.0
    restarts: int = 0
    fast_crashes: int = 0
    """Consecutive crashes, each soon after the start."""
    act_at: float = 0.0
    """RESTARTING: when to start again. STOPPING: when to kill."""
    reason: str = ""

    @property
    def slug(self) -> Slug:
        return slug_of(parse_device_id(self.device_id))


class CorruptError(Exception):
    """A placement.json that this program did not write, or that was damaged."""


def translated(error: OSError, what: str) -> WatchdogError:
    """Permission and path errors must be fixed by the operator; others may be temporary (such as a full disk)."""
    text = f"{what}: {error.strerror or error}"
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}:
        return UserError(f"{text}; the local scheduler needs a writable directory")
    return TransientError(text)


def write_whole(path: Path, text: str) -> None:
    """Replace the file atomically; mode 0600. After a crash it has the old or the new content."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)


def write_entry(home: Path, entry: Entry) -> None:
    write_whole(home / "placement.json", json.dumps(asdict(entry)))


def read_entry(home: Path) -> Entry | None:
    """None = no placement. Raises CorruptError, or OSError when it cannot be read."""
    try:
        text = (home / "placement.json").read_text()
    except FileNotFoundError:
        return None
    try:
        found = Entry(**loads(text))
        PlacementState(found.state)
        if found.slug != home.name:
            raise CorruptError(f"it belongs to another device than {home.name}")
        for number in (found.epoch, found.pid, found.pid_start, found.restarts):
            if type(number) is not int or number < 0:
                raise CorruptError("a number is not valid")
    except (ValueError, TypeError, UserError) as error:
        raise CorruptError(str(error)) from error
    return found


def read_api(home: Path) -> tuple[str, ...]:
    """The addresses that the agent reports to; () = they cannot be read."""
    try:
        addresses = loads((home / "config.json").read_text())["api"]
        return tuple(str(one) for one in addresses)
    except (OSError, ValueError, KeyError, TypeError):
        return ()


@contextmanager
def exclusive(home: Path) -> Iterator[None]:
    """Hold the lock for decisions about one device, among all threads and processes. Blocks."""
    descriptor = os.open(home / "decide", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Unlock explicitly: a process that is being spawned may share this descriptor for a moment.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def bound_log(path: Path) -> None:
    """Copy and truncate a log, because the agent has it open. Lines that it writes between these are lost."""
    try:
        if path.stat().st_size <= LOG_BYTES:
            return
        with path.open("rb") as stream:
            stream.seek(-LOG_BYTES, os.SEEK_END)
            old = path.with_name("agent.log.1")
            private_files.file(old)
            old.write_bytes(stream.read())
        os.truncate(path, 0)
    except FileNotFoundError:
        return
