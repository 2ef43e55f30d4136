"""Reads a file that lists devices (`device_list` has the formats), and notices that it has changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Final

from nomad_watchdog import text_files
from nomad_watchdog.controllers import device_list
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import Slug, slug_of
from nomad_watchdog.model import Device

MAX_BYTES: Final = 32 * 1024 * 1024
Signature = tuple[int, ...]
"""Equal = the same content: file system, inode, size, change times (nanoseconds)."""


class ChangingError(UserError):
    """The file was changed while it was read: read it again later."""


def signature(path: str | Path) -> Signature:
    """Of the file at this path, links followed. Raises UserError if there is none."""
    try:
        found = Path(path).stat()
    except OSError as error:
        raise UserError(f"{text_files.shown(str(path))}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{text_files.shown(str(path))}: not a regular file")
    return _signature(found)


def _signature(found: os.stat_result) -> Signature:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read(
    path: str | Path, expected: Signature, classes: Collection[str] | None = None
) -> dict[Slug, Device]:
    """The devices that the file lists; at least one. `classes`: the configured agent classes, None = any.

    Raises ChangingError if it is not, or no longer, the file of `expected`, and one UserError with all errors in
    the file. An empty file is an error, because it may be a truncated one."""
    name = text_files.shown(str(path))
    try:
        with Path(path).open("rb") as file:
            body = file.read(MAX_BYTES + 1)
            after = _signature(os.fstat(file.fileno()))
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from error
    # The file of the descriptor is the one that was read, even if the path leads to another one by now.
    if after != expected:
        raise ChangingError(f"{name} is being changed")
    if len(body) > MAX_BYTES:
        raise UserError(f"{name}: more than {MAX_BYTES} bytes")
    text = text_files.decoded(name, body)
    try:
        listed = device_list.parse(text, device_list.format_of(str(path)), str(path), classes)
    except UserError as error:
        lines = str(error).split("\n")
        raise UserError("\n".join(f"{name}: {line}" for line in lines)) from None
    if not listed:
        raise UserError(
            f"{name}: lists no device; to remove all devices, run `devices rm` and remove the file from "
            "`inventory`"
        )
    return {slug_of(one.device.id): one.device for one in listed}
