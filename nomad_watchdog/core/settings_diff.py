"""Describes the differences between two sets of settings: ``memory 96Mi → 80Mi``.

Settings are text by dotted name. A value that begins with HIDDEN is a digest of a value that is not displayed,
because it may contain a secret (S10).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HIDDEN: Final = "#"
MOST: Final = 8
"""Maximum number of differences that are listed."""


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """One entry per setting, in the order of the names; a block that is only on one side is one entry."""
    there, here = _blocks(before), _blocks(after)
    found: dict[str, None] = {}
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if old is None and (block := _missing(name, there)):
            found[f"{block} added"] = None
        elif new is None and (block := _missing(name, here)):
            found[f"{block} removed"] = None
        elif _is_hidden(old) or _is_hidden(new):
            found[f"{name} changed"] = None
        else:
            found[f"{name} {_shown(old)} → {_shown(new)}"] = None
    return list(found)


def words(before: Mapping[str, str], after: Mapping[str, str], most: int = MOST) -> str:
    """The differences as one line, at most `most` by name; "" = there are none."""
    found = differences(before, after)
    more = [f"and {len(found) - most} more"] if len(found) > most else []
    return ", ".join([*found[:most], *more])


def _around(name: str) -> list[str]:
    """The blocks that a setting is in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:number]) for number in range(1, len(parts))]


def _blocks(settings: Mapping[str, str]) -> set[str]:
    return {block for name in settings for block in _around(name)}


def _missing(name: str, blocks: set[str]) -> str:
    """The outermost block around a setting that is not among these; "" = all are."""
    return next((block for block in _around(name) if block not in blocks), "")


def _is_hidden(value: str | None) -> bool:
    return value is not None and value.startswith(HIDDEN)


def _shown(value: str | None) -> str:
    return "unset" if value is None else value or '""'
