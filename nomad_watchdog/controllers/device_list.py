"""Lists of devices in a text, as HCL, JSON or CSV: what each item says, and all errors with their line numbers.

``hcl``: blocks ``device "ID" { address = "…"  class = "…"  ttl = "90s"  labels = { … } }``.
``json``: one object per line, as ``devices export`` prints them, or one array of such objects.
``csv`` (RFC 4180): a first line that names the columns ``id``, ``address``, ``class``, ``ttl`` and ``label.NAME`` for a
label, then one device per line. An empty cell is a field that is not given.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator
from pathlib import PurePath
from typing import Final, NamedTuple

from pydantic import ValidationError

from nomad_watchdog.config import hcl
from nomad_watchdog.device_fields import DeviceItem, problem
from nomad_watchdog.errors import UserError
from nomad_watchdog.fast_json import strict
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import Device
from nomad_watchdog.text_files import did_you_mean
from nomad_watchdog.units import show

FORMATS: Final = ("json", "hcl", "csv")
MAX_DEVICES: Final = 100_000
MAX_PROBLEMS: Final = 50
MAX_CELL: Final = 64 * 1024
_COLUMNS: Final = ("id", "address", "class", "ttl")
_LABEL: Final = "label."


class ListedDevice(NamedTuple):
    """One item of a list."""

    where: str
    """Its line, in words."""
    fields: dict[str, object]
    """As given: a field that is left out is not here."""
    device: Device


def format_of(path: str) -> str:
    """The format of a file by the end of its name; JSON unless it is another."""
    end = PurePath(path).suffix.removeprefix(".").lower()
    return end if end in FORMATS else "json"


def parse(
    text: str, form: str, source: str, classes: Collection[str] | None = None
) -> list[ListedDevice]:
    """The items. `form`: one of FORMATS. `source`: the file, for errors. `classes`: the
    configured agent classes, None = any.

    Raises one UserError with all errors, at most MAX_PROBLEMS, a line each."""
    problems: list[str] = []
    items = {"hcl": _hcl, "csv": _csv}.get(form, _json)(text, source, problems)
    listed = _devices(items, classes, problems)
    if problems:
        more = len(problems) - MAX_PROBLEMS
        raise UserError(
            "\n".join([*problems[:MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])])
        )
    return listed


def _devices(
    items: Iterator[tuple[str, object]], classes: Collection[str] | None, problems: list[str]
) -> list[ListedDevice]:
    listed: list[ListedDevice] = []
    first: dict[Slug, str] = {}
    for where, item in items:
        try:
            fields = DeviceItem.model_validate(item)
            mapping = item if isinstance(item, dict) else {}
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
        if slug in first:
            problems.append(
                f"{where}: device {show(fields.id)} is listed twice, first: {first[slug]}"
            )
        listed.append(ListedDevice(where, mapping, fields.device(DeviceId(fields.id))))
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


def _json(text: str, _source: str, problems: list[str]) -> Iterator[tuple[str, object]]:
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
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    seen = 0
    for item in items:
        while text[at] in ", \t\r\n":
            at += 1
        line += text.count("\n", seen, at)
        yield f"line {line}", item
        seen, (_, at) = at, decoder.raw_decode(text, at)


def _csv(text: str, _source: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    before = 0
    try:
        for cells in reader:
            where, before = f"line {before + 1}", reader.line_num
            if not any(cells):
                continue
            if not names:
                names = cells
                if bad := list(_bad_columns(where, names)):
                    problems += bad
                    return
            elif len(cells) != len(names):
                problems.append(f"{where}: {len(cells)} cells, but {len(names)} columns")
            else:
                yield where, _row(names, cells)
    except csv.Error as error:
        problems.append(f"line {reader.line_num}: not CSV: {error}")


def _bad_columns(where: str, names: list[str]) -> Iterator[str]:
    for name in names:
        if name not in _COLUMNS and not name.startswith(_LABEL):
            hint = did_you_mean(name, _COLUMNS)
            known = f"{', '.join(_COLUMNS)}, {_LABEL}NAME"
            yield f"{where}: no such column: {show(name)}; {hint}columns: {known}"
    if len(set(names)) < len(names):
        yield f"{where}: a column is named twice"
    if not {"id", "address"} <= set(names):
        yield f"{where}: the first line must name the columns, at least id and address"


def _row(names: list[str], cells: list[str]) -> dict[str, object]:
    given = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    labels = {
        name.removeprefix(_LABEL): cell for name, cell in given.items() if name.startswith(_LABEL)
    }
    fields: dict[str, object] = {name: given[name] for name in _COLUMNS if name in given}
    return fields | ({"labels": labels} if labels else {})
