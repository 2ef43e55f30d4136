"""Files with secrets: who may own and write them, and what they hold (S10).

A file is rejected if everybody can write it or a group other than this process's own or root's, or if it belongs
neither to this process's user nor to root: its content may be somebody else's. One that everybody can read is used, and reported: a Kubernetes or Docker secret
is mounted as a file of root that its container reads as "others".
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from pathlib import Path
from typing import Final

from watchdog_agent.runtime.parsing import whole_or

_MOUNTED: Final = ("/run/secrets/", "/var/run/secrets/")
"""Where Docker and Kubernetes put secrets that only the container sees."""


def read(path: str | Path, most: int, *, pipe: bool = False) -> bytes:
    """At most `most` bytes of the file. `pipe`: it may be one, such as <(vault read ...), and is waited for.

    Raises OSError whose strerror says in words what is wrong, also for a file that is not safe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if pipe and stat.S_ISFIFO(found.st_mode):
            os.set_blocking(descriptor, True)
        elif stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        if problem := unsafe(found):
            raise PermissionError(errno.EPERM, problem)
        return stream.read(most)


def check(path: str | Path) -> None:
    """Raises OSError for a file that others can write, or that is not there. For the key of a certificate: it
    may belong to another service's user, and whoever owns it can't choose the certificate."""
    if problem := _writable(os.stat(path)):  # noqa: PTH116  # one path, as it was given
        raise PermissionError(errno.EPERM, problem)


def owners() -> frozenset[int]:
    """The users whose files are trusted: ours, root, and who called sudo."""
    mine = os.geteuid()
    by_sudo = os.environ.get("SUDO_UID", "") if mine == 0 else ""
    return frozenset({0, mine, whole_or(by_sudo, 0)})


def groups() -> frozenset[int]:
    """The groups that may write files with secrets: ours, where users have a group of their own and umask 002, and
    root's; who called sudo as above."""
    mine = os.getegid()
    by_sudo = os.environ.get("SUDO_GID", "") if os.geteuid() == 0 else ""
    return frozenset({0, mine, whole_or(by_sudo, 0)})


def unsafe(found: os.stat_result) -> str:
    """Why the content of this file can't be trusted; "" = it can."""
    if found.st_uid not in owners():
        return (
            f"belongs to user {user(found.st_uid)}, not to {user(os.geteuid())} or root; "
            f"chown {user(os.geteuid())} the file"
        )
    return _writable(found)


def foreign_path(path: Path) -> str:
    """As `foreign`, of a file that is not open; "" also when there is none."""
    try:
        return foreign(path.stat(), path)
    except OSError:
        return ""


def foreign(found: os.stat_result, path: Path) -> str:
    """Why a file that nobody named can't be trusted to be this user's; "" = it can. Stricter than `unsafe`: a link to
    it must not be somebody else's."""
    link = path.lstat()
    if link.st_uid not in owners():
        return f"belongs to user {user(link.st_uid)}"
    return unsafe(found)


def _writable(found: os.stat_result) -> str:
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_IWOTH:
        return f"can be written by everybody (mode {mode:04o}); chmod 600 the file"
    if mode & stat.S_IWGRP and found.st_gid not in groups():
        return f"can be written by its group (mode {mode:04o}); chmod 600 the file"
    return ""


def exposed(path: str | Path) -> str:
    """Who can read or write this file besides its owner and needs not; "" = nobody, or there is no such file."""
    try:
        found = os.stat(path)  # noqa: PTH116  # as above
        if not stat.S_ISREG(found.st_mode) or _mounted(Path(path)):
            return ""
    except (OSError, ValueError):
        return ""
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_IROTH:
        return f"can be read by everybody (mode {mode:04o})"
    if mode & stat.S_IWGRP:
        return f"can be written by its group (mode {mode:04o})"
    return ""


def _mounted(path: Path) -> bool:
    """Whether it is in a volume of Kubernetes, whose files are links through ..data, or a secret of Docker."""
    return str(path.absolute()).startswith(_MOUNTED) or (path.parent / "..data").is_symlink()


def user(number: int) -> str:
    """The name of a user, or the number of one that has none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
