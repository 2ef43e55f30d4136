"""Reads a file that lists devices, and reports all errors with their line numbers.

``.hcl``: blocks ``device "ID" { address = "…"  class = "…"  ttl = "90s"  labels = { … } }``.
``.json``: one object per line, as ``devices export`` prints them, or one array of such objects.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from nomad_watchdog import text_files
from nomad_watchdog.config import hcl
from nomad_watchdog.device_fields import DeviceItem, problem
from nomad_watchdog.errors import UserError
from nomad_watchdog.fast_json import strict
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import Device
from nomad_watchdog.text_files import did_you_mean
from nomad_watchdog.units import show

MAX_BYTES: Final = 32 * 1024 * 1024
MAX_DEVICES: Final = 100_000
MAX_PROBLEMS: Final = 50
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
    problems: list[str] = []
    items = _hcl(text, str(path), problems) if str(path).endswith(".hcl") else _json(text, problems)
    listed = _devices(items, classes, problems)
    if problems:
        raise UserError("\n".join(f"{name}: {line}" for line in _first(problems)))
    if not listed:
        raise UserError(
            f"{name}: lists no device; to remove all devices, run `devices rm` and remove the file from "
            "`inventory`"
        )
    return listed


def read_lines(text: str) -> list[tuple[str, dict[str, object]]]:
    """The position and the fields of each device in a text: one JSON object per line, or one array of them. Blank text
    lists no device.

    Raises one UserError with all errors and their line numbers."""
    problems: list[str] = []
    items: list[tuple[str, dict[str, object]]] = []

    def kept() -> Iterator[tuple[str, object]]:
        for where, item in _json(text, problems):
            if isinstance(item, dict):
                items.append((where, item))
            yield where, item

    _devices(kept(), None, problems)
    if problems:
        raise UserError("\n".join(_first(problems)))
    return items


def _first(problems: list[str]) -> list[str]:
    more = len(problems) - MAX_PROBLEMS
    return problems[:MAX_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])


def _devices(
    items: Iterator[tuple[str, object]], classes: Collection[str] | None, problems: list[str]
) -> dict[Slug, Device]:
    listed: dict[Slug, Device] = {}
    first: dict[Slug, str] = {}
    for where, item in items:
        try:
            fields = DeviceItem.model_validate(item)
        except ValidationError as error:
            problems.append(f"{where}: {problem(error, DeviceItem)}")
            continue
        if classes is not None and fields.agent_class not in classes:
            hint = did_you_mean(fields.agent_class, classes)
            problems.append(
                f"{where}: device {show(fields.id)}: no agent class {show(fields.agent_class)}; "
                f"{hint}configured: {', '.join(sorted(classes))}"
            )
        slug = slug_of(DeviceId(fields.id))
        if slug in listed:
            problems.append(
                f"{where}: device {show(fields.id)} is listed twice, first: {first[slug]}"
            )
        listed[slug] = fields.device(DeviceId(fields.id))
        first.setdefault(slug, where)
        if len(listed) > MAX_DEVICES:
            problems.append(f"{where}: more than {MAX_DEVICES} devices")
            break
    return listed


def _hcl(text: str, source: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    document = hcl.read(text, source)
    problems += [f"line {p.line}: {show(str(p.path[-1]))} {p.message}" for p in document.problems]
    for name in document.data.keys() - {"device"}:
        line = document.line_of((name,))
        problems.append(f'line {line}: {show(name)} is no device; write  device "ID" {{ ... }}')
    blocks = document.data.get("device", {})
    if not isinstance(blocks, dict):
        problems.append(f'line {document.line_of(("device",))}: write  device "ID" {{ ... }}')
        return
    for device_id, body in blocks.items():
        where = f"line {document.line_of(('device', device_id))}"
        if not isinstance(body, dict):
            problems.append(f'{where}: write  device "ID" {{ ... }}')
        elif "id" in body:
            problems.append(f"{where}: id: unknown field; the id is the block's label")
        else:
            yield where, body | {"id": device_id}


def _json(text: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    if text.lstrip()[:1] == "[":
        yield from _json_array(text, problems)
        return
    # Not splitlines(): an id may hold what Unicode calls a line end, and JSON does not.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"line {number}"
            try:
                yield where, strict(line)
            except ValueError as error:
                problems.append(f"{where}: not a JSON object: {error}")


def _json_array(text: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    try:
        items = strict(text)
    except ValueError as error:
        problems.append(f"not JSON: {error}")
        return
    for number, item in enumerate(items, 1):
        yield f"item {number}", item
