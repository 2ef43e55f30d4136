"""An event as one line for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nomad_watchdog.cli._fields import mapping
from nomad_watchdog.terminal import clean
from nomad_watchdog.units import age, local

_BEFORE: Final = {
    "plan.start": "agent is started: ",
    "plan.retire": "agent is stopped: ",
    "plan.replace": "agent is replaced: ",
    "refused": "report refused: ",
    "error": "action failed: ",
}
"""What a kind adds to the text of its events. The texts of other kinds are sentences of their own."""


def event_line(event: Mapping[str, object], *, with_kind: bool = False) -> str:
    """When (local time), which device, what happened, and the state before. `with_kind`: the kind as well, for
    `events --kind`."""
    kind, text = clean(event.get("kind")), clean(event.get("text"))
    parts = [
        local(event.get("at")),
        kind if with_kind else "",
        clean(event.get("device")),
        f"{_what(kind)}{text or kind}",
    ]
    return "  ".join(part for part in parts if part) + _before(mapping(event.get("data")))


def _what(kind: str) -> str:
    first, _, rest = kind.partition(".")
    if first == "verdict":
        return f"is {rest}: "
    if first == "repair":
        return f"repair {rest.replace('_', ' ')}: "
    return _BEFORE.get(kind, "")


def _before(data: Mapping[str, object]) -> str:
    was, lasted = data.get("was"), age(data.get("was_for_s"))
    return f" (was {clean(was)} for {lasted})" if was and lasted else ""
