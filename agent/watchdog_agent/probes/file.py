"""Probes a file on the agent's host: lines appended to a log, or the age of a file. Local files only: a hanging
read from a network file system would block the agent."""

from __future__ import annotations

import os
import stat
import time
from io import FileIO

from watchdog_agent import errors
from watchdog_agent.config import optional_table, table, validators
from watchdog_agent.runtime import http, outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Document, Ended, Follower, Probe

MAX_ROUND = 256 * 1024
"""Maximum number of bytes read per run; for a log that grows faster the rest is skipped and reported."""


def check(probe: Document, where: str) -> None:
    """Check the settings. Raises ConfigError."""
    validators.require(probe, "file", table.PATH, where)
    validators.fill(probe, optional_table.FileProbe, where)
    if not any(probe.get(name) for name in ("expect_text", "forbid_text", "max_age_s")):
        raise errors.ConfigError(
            f"{where}: file needs one of expect_text, forbid_text and max_age_s"
        )
    probe["follower"] = FileFollower(str(probe["file"]))


def start(loop: Loop, spec: Probe, _address: str, ended: Ended) -> None:
    """Read the file now; the result is delivered from the event loop, like that of any other probe. A missing file is
    a miss; an unreadable one is not."""
    try:
        answer = read(spec, spec["follower"], time.time())
    except (FileNotFoundError, NotADirectoryError) as error:
        answer = (False, f"{spec['file']}: {http.reason_of(error)}")
    except OSError as error:
        answer = (False, outcome.Unable(f"{spec['file']}: {http.reason_of(error)}"))
    loop.later(0, lambda: ended(*answer))


def read(spec: Probe, follower: Follower, now: float) -> tuple[bool, str]:
    """(ok, reason) of one run at `now`, seconds since 1970. Raises OSError."""
    name = os.path.basename(spec["file"])
    facts = os.stat(spec["file"])
    if not stat.S_ISREG(facts.st_mode):
        return False, f"{name} is no regular file"
    most, age = spec.get("max_age_s"), max(0.0, now - facts.st_mtime)
    if most and age > most:
        return False, f"{name} was last written {age:.0f} s ago; {most:g} s are allowed"
    wanted, unwanted = spec.get("expect_text"), spec.get("forbid_text")
    if not wanted and not unwanted:
        return True, f"{name} was written {age:.0f} s ago"
    first = follower.file is None
    longest = max(len((text or "").encode()) for text in (wanted, unwanted))
    new, skipped = follower.appended(facts, longest - 1)
    if first:
        return True, f"{name} is watched from its end on"
    tail = f" ({skipped} bytes were skipped)" if skipped else ""
    ok, reason = _judged(name, new, wanted, unwanted)
    return ok, reason if ok else reason + tail


def _judged(name: str, new: bytes, wanted: str | None, unwanted: str | None) -> tuple[bool, str]:
    """(ok, reason) for the appended bytes."""
    if unwanted and unwanted.encode() in new:
        return False, f"{name} says {unwanted!r}"
    if wanted and wanted.encode() not in new:
        return False, f"{name} does not say {wanted!r}"
    return True, f"{name} says {wanted!r}" if wanted else f"{name} does not say {unwanted!r}"


class FileFollower:
    """The read position in a log. Keeps the file open, so that lines written just before a rotation are read
    too."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: FileIO | None = None
        self.tail = b""
        """The end of the bytes already read, because a text may be written in two parts."""

    def appended(self, facts: os.stat_result, overlap: int) -> tuple[bytes, int]:
        """(bytes appended since the last read, preceded by `overlap` old bytes; number of bytes skipped).

        The first read returns nothing and starts at the end. Raises OSError."""
        if self.file is None:
            self.file = self._opened()
            self.file.seek(0, os.SEEK_END)
            return b"", 0
        new, skipped = self._rest(self.file)
        mine = os.fstat(self.file.fileno())
        if (mine.st_dev, mine.st_ino) != (facts.st_dev, facts.st_ino):
            self.file.close()
            self.file = self._opened()
            more, passed = self._rest(self.file)
            # Two files: no text spans the end of one and the beginning of the other.
            new, skipped = new + b"\n" + more, skipped + passed
        whole = self.tail + new
        self.tail = whole[len(whole) - overlap :] if overlap > 0 else b""
        # A text counts once: without new bytes, the old ones are not searched again.
        return (whole, skipped) if new else (b"", skipped)

    def peek(self) -> FileFollower:
        """A copy at the same position, for a read that does not affect the next one."""
        other = FileFollower(self.path)
        other.tail = self.tail
        if self.file is not None:
            # By descriptor: there may already be another file with this name.
            fd = os.open(f"/proc/self/fd/{self.file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
            other.file = FileIO(fd, "rb")
            other.file.seek(self.file.tell())
        return other

    def _opened(self) -> FileIO:
        # O_NONBLOCK: a pipe in place of the log must not block the agent.
        fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return FileIO(fd, "rb")

    def _rest(self, file: FileIO) -> tuple[bytes, int]:
        at, size = file.tell(), os.fstat(file.fileno()).st_size
        if size < at:  # truncated and rewritten
            at = file.seek(0)
            self.tail = b""
        skipped = max(0, size - at - MAX_ROUND)
        if skipped:
            file.seek(skipped, os.SEEK_CUR)
            self.tail = b""
        return file.read(MAX_ROUND) or b"", skipped
