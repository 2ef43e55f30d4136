"""A file that lists devices, as values; or everything that is wrong with it, with its lines.

``.hcl``: blocks ``device "ID" { address = "…"  class = "…"  ttl = "90s"  labels = { … } }``.
``.json``: one object a line, as ``devices export`` prints them, or one array of such objects.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

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
    """The file was changed while it was read: look again later."""


def signature(path: str | Path) -> Signature:
    """Of the file that the path leads to now, links followed. Raises UserError when there is none."""
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
    """The devices that the file lists; at least one. `classes`: the agent classes that there are, None = any.

    Raises ChangingError when it is not, or no longer, the file of `expected`, and one UserError that
    names everything that is wrong with it. An empty file is wrong: it looks too much like a torn one."""
    name = text_files.shown(str(path))
    try:
        with Path(path).open("rb") as file:
            body = file.read(MAX_BYTES + 1)
            after = _signature(os.fstat(file.fileno()))
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from error
    # The descriptor's file is what was read, whatever the path was made to lead to meanwhile.
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
            f"{name}: lists no device; to let all of them go, say `devices rm` and take the file out of "
            "`inventory`"
        )
    return listed


def read_lines(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Where each device of a text stands and what it says, one JSON object per line or one array of them. Blank text
    lists none.

    Raises one UserError that names everything that is wrong, with its line."""
    problems: list[str] = []
    items: list[tuple[str, dict[str, Any]]] = []

    def kept() -> Iterator[tuple[str, Any]]:
        for where, item in _json(text, problems):
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
    items: Iterator[tuple[str, Any]], classes: Collection[str] | None, problems: list[str]
) -> dict[Slug, Device]:
    listed: dict[Slug, Device] = {}
    first: dict[Slug, str] = {}
    for where, item in items:
        try:
            wish = DeviceItem.model_validate(item)
        except ValidationError as error:
            problems.append(f"{where}: {problem(error, DeviceItem)}")
            continue
        if classes is not None and wish.agent_class not in classes:
            hint = did_you_mean(wish.agent_class, classes)
            problems.append(
                f"{where}: device {show(wish.id)}: no agent class {show(wish.agent_class)}; "
                f"{hint}configured: {', '.join(sorted(classes))}"
            )
        slug = slug_of(DeviceId(wish.id))
        if slug in listed:
            problems.append(
                f"{where}: device {show(wish.id)} is listed twice, first: {first[slug]}"
            )
        listed[slug] = wish.device(DeviceId(wish.id))
        first.setdefault(slug, where)
        if len(listed) > MAX_DEVICES:
            problems.append(f"{where}: more than {MAX_DEVICES} devices")
            break
    return listed


def _hcl(text: str, source: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
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


def _json(text: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
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


def _json_array(text: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        items = strict(text)
    except ValueError as error:
        problems.append(f"not JSON: {error}")
        return
    for number, item in enumerate(items, 1):
        yield f"item {number}", item
