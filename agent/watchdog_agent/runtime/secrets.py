"""Secrets in files, read again for each use, because mounted files rotate.

A file that other users or another group can write, or that is owned by neither the agent's user nor root, may
contain someone else's secret, and is not used.
"""

from __future__ import annotations

import os

MAX_BYTES = 4096
_logged: dict[str, str] = {}


def read(path: str) -> bytes:
    """The file's content without surrounding whitespace. Raises OSError, also for an unsafe file."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if found.st_uid not in (0, os.geteuid()):
            raise OSError(f"belongs to user {found.st_uid}, not to {os.geteuid()} or root")
        _check_mode(found)
        return os.read(fd, MAX_BYTES).strip()
    finally:
        os.close(fd)


def check(path: str) -> None:
    """Check the private key of a certificate, which may belong to any user. Raises OSError if others can write it."""
    _check_mode(os.stat(path))


def _check_mode(found: os.stat_result) -> None:
    if found.st_mode & 0o002:
        raise OSError(f"can be written by everybody (mode {found.st_mode & 0o7777:04o})")
    if found.st_mode & 0o020 and found.st_gid not in (0, os.getegid()):
        raise OSError(f"can be written by its group (mode {found.st_mode & 0o7777:04o})")


def token(path: str) -> str:
    """The token in the file; "" if there is no usable one. The reason is logged when it changes."""
    if not path:
        return ""
    try:
        found, why = read(path).decode("ascii"), ""
    except OSError as error:
        found, why = "", error.strerror or str(error)
    except ValueError:
        found, why = "", "holds characters that no token has"
    if why and _logged.get(path) != why:
        from watchdog_agent.runtime.log import log

        log("a token is not used", file=path, reason=why)
    _logged[path] = why
    return found
