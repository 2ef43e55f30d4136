"""Fields of the API's answers as text for a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nomad_watchdog.terminal import cell
from nomad_watchdog.units import age, span, utc

_MOMENTS: Final = frozenset({"at", "since", "created_at", "begins", "ends"})
"""Fields whose values are unix seconds."""


def head(name: str) -> str:
    """The title of a column."""
    return name.removesuffix("_s").replace("_", " ").upper()


def field_text(name: str, value: object) -> object:
    """A value for a table: durations with a unit."""
    if name == "ttl":
        return span(value)
    return age(value) if name.endswith("_s") else value


def leaf(key: str, value: object) -> tuple[str, str]:
    """A field of an object for people: its name and its value; moments as UTC, durations with a unit."""
    if key in _MOMENTS and isinstance(value, int | float) and not isinstance(value, bool):
        return key, utc(value)
    for suffix, ago in (("_s_ago", " ago"), ("since_s", " ago"), ("_s", "")):
        if key.endswith(suffix) and (value is None or isinstance(value, int | float)):
            name = "since" if suffix == "since_s" else key.removesuffix(suffix)
            return name, "" if value is None else f"{age(value)}{ago}"
    return key, cell(value)


def rollout_line(one: Mapping[str, object]) -> str:
    """A roll-out in one line: class, version, state, step, numbers of devices, and what happens next."""
    step = f", {one['step']}" if one.get("step") else ""
    then = f"; next: {one['next']}" if one.get("next") else ""
    return (
        f"{one.get('class')} {one.get('version')}: {one.get('state')}{step}; {one.get('ok')} ok, "
        f"{one.get('failed')} bad, {one.get('waiting')} waiting{then}"
    )


def mapping(value: object) -> Mapping[str, object]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}
