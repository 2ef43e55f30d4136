"""Settings as text by dotted name, so that a change can be stated in words (`core.settings_diff`)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final, Literal, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from nomad_watchdog.core.settings_diff import HIDDEN
from nomad_watchdog.units import parse_duration, parse_size

_UNITS: Final = (("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10))
_OPEN: Final = frozenset({"version", "template", "driver", "workload", "probe"})
"""Text of a class that is displayed unchanged; other text may contain a secret."""


def flat(block: BaseModel, *, hide_text: bool) -> dict[str, str]:
    """All settings of a block and of its nested blocks. Durations and sizes are written as in a file. `hide_text`:
    replace each text that may contain a secret with a digest."""
    return dict(_walk(block, "", hide_text=hide_text))


def _walk(
    block: BaseModel, prefix: str, *, hide_text: bool, in_list: bool = False
) -> Iterator[tuple[str, str]]:
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        if name == "kind" and in_list:
            continue  # it is part of the name
        for place, one in _parts(f"{prefix}{name}", value):
            if isinstance(one, BaseModel):
                listed = isinstance(value, tuple)
                yield from _walk(one, f"{place}.", hide_text=hide_text, in_list=listed)
            elif one not in (None, ()):
                hidden = hide_text and not _is_open(name, one, field)
                yield place, _digest(one) if hidden else _text(one, field)


def _parts(place: str, value: object) -> Iterator[tuple[str, object]]:
    """The values in a setting, each with its name."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield f"{place}.{key}", one
    elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        seen: Counter[str] = Counter()
        for one in value:
            kind = str(getattr(one, "kind", ""))
            seen[kind] += 1
            number = f"#{seen[kind]}" if seen[kind] > 1 or not kind else ""
            yield (f"{place}.{kind}" if kind else place) + number, one
    else:
        yield place, value


def _is_open(name: str, value: object, field: FieldInfo) -> bool:
    literal = get_origin(field.annotation) is Literal
    return literal or name in _OPEN or isinstance(value, bool | int | float)


def _text(value: object, field: FieldInfo) -> str:
    readers = {one.func for one in field.metadata if isinstance(one, BeforeValidator)}
    readers |= {
        one.func
        for annotation in getattr(field.annotation, "__args__", ())
        for one in getattr(annotation, "__metadata__", ())
        if isinstance(one, BeforeValidator)
    }
    if isinstance(value, bool):
        return "true" if value else "false"
    if parse_size in readers and isinstance(value, int):
        return size(value)
    if parse_duration in readers and isinstance(value, int | float):
        return duration(value)
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def size(value: int) -> str:
    """Format bytes as in a file: 96Mi."""
    for unit, factor in _UNITS:
        if value >= factor and value % factor == 0:
            return f"{value // factor}{unit}"
    return str(value)


def duration(seconds: float) -> str:
    """Format seconds as in a file: 90s, 1500ms, 2h."""
    for unit, factor in (("h", 3600), ("m", 60)):
        if seconds >= factor and seconds % factor == 0:
            return f"{seconds // factor:g}{unit}"
    whole = seconds == int(seconds)
    return f"{seconds:g}s" if whole else f"{seconds * 1000:g}ms"


def _digest(value: object) -> str:
    return HIDDEN + hashlib.sha256(repr(value).encode()).hexdigest()[:12]
