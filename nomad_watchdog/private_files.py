"""Files and folders of this user alone, whatever the umask is: 0600 and 0700."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

FILE: Final = 0o600
FOLDER: Final = 0o700
_SQLITES: Final = ("-wal", "-shm", "-journal")


def folder(path: Path) -> None:
    """Make it and what is missing above it. One that is there keeps its mode. Raises OSError."""
    if path.is_dir():
        return
    if path.parent != path:
        folder(path.parent)
    try:
        path.mkdir(mode=FOLDER)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    else:
        path.chmod(FOLDER)


def file(path: Path) -> None:
    """Make an empty file if there is none, and let nobody else read one that is there. Raises OSError."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE))
    close_to_others(path)


def open_to(path: Path) -> str:
    """Who besides us can use this file or folder of ours, in words; "" = nobody, or it is not ours."""
    try:
        found = path.stat()
    except OSError:
        return ""
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid() or not mode & 0o077:
        return ""
    return f"is open to other users (mode {mode:04o})"


def close_to_others(path: Path) -> None:
    """Let nobody else read or write this file, and what SQLite keeps beside it, which it gives the mode of the
    database when it makes it. What can't be changed stays."""
    for one in (path, *(path.with_name(path.name + suffix) for suffix in _SQLITES)):
        # Not through a descriptor: closing one would drop SQLite's locks on the file.
        with suppress(OSError):
            found = one.stat()
            if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != FILE:
                one.chmod(FILE)
