"""Lists of devices: filtered, in the order of their ids, by page, without blocking the event loop."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from watchdog_agent.runtime.parsing import whole

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.errors import UserError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.views import DeviceView
from nomad_watchdog.ids import Slug
from nomad_watchdog.labels import parse_labels
from nomad_watchdog.model import DeviceRecord, Presence, VerdictState

MAX_ITEMS: Final = 1_000
DEFAULT_ITEMS: Final = 100
YIELD_S: Final = 0.002
"""Seconds of work on a list after which other tasks may run."""

LIST_QUERY: Final = {
    "class": "only devices of this agent class",
    "verdict": f"only this verdict: {', '.join(VerdictState)}",
    "presence": "present (default; absent with verdict=departed), absent or any",
    "label": "key=value; may be repeated, all must match",
    "q": "text that the id or the address contains",
    "limit": f"1 to {MAX_ITEMS}, default {DEFAULT_ITEMS}",
    "cursor": "`next` of the previous page",
}


def check_query(
    request: web.Request, allowed: Collection[str], repeatable: Collection[str] = ()
) -> None:
    """Raises UserError for unknown and repeated query parameters."""
    for name in request.query:
        if name not in allowed:
            raise UserError(
                f"unknown query parameter {ascii(name)[:60]}; allowed are: {', '.join(sorted(allowed)) or 'none'}"
            )
        if name not in repeatable and len(request.query.getall(name)) > 1:
            raise UserError(f"query parameter {name} is given more than once")


def whole_number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """A query parameter that is a whole number from low to high. Raises UserError."""
    text = request.query.get(name)
    if text is None:
        return default
    try:
        return whole(text, low, high)
    except ValueError:
        shown = ascii(text)[:40]
        raise UserError(f"{name} is {shown}; a number from {low} to {high} is allowed") from None


@dataclass(frozen=True, slots=True)
class _Filter:
    agent_class: str | None
    verdict: VerdictState | None
    presence: Presence | None
    labels: tuple[tuple[str, str], ...]
    text: str
    after: str

    def admits(self, record: DeviceRecord) -> bool:
        """Whether the record matches. The verdict, which costs more, is checked only for these."""
        device = record.device
        return (
            (self.presence is None or record.presence is self.presence)
            and (self.agent_class is None or device.agent_class == self.agent_class)
            and all(device.labels.get(key) == value for key, value in self.labels)
            and (self.text in device.id.casefold() or self.text in device.address.casefold())
        )


def _filter(request: web.Request) -> _Filter:
    query = request.query
    labels = parse_labels(query.getall("label", []))
    # Departed devices are absent, so without `presence` the verdict alone decides.
    departed = query.get("verdict") == VerdictState.DEPARTED
    presence = query.get("presence", "absent" if departed else "present")
    if presence not in {*Presence, "any"}:
        raise UserError(f"presence is {ascii(presence)[:40]}; allowed are: present, absent, any")
    verdict = query.get("verdict")
    if verdict is not None and verdict not in set(VerdictState):
        raise UserError(f"verdict is {ascii(verdict)[:40]}; allowed are: {', '.join(VerdictState)}")
    return _Filter(
        agent_class=query.get("class"),
        verdict=None if verdict is None else VerdictState(verdict),
        presence=None if presence == "any" else Presence(presence),
        labels=tuple(labels.items()),
        text=query.get("q", "").casefold(),
        after=_uncursor(query.get("cursor", "")),
    )


def _cursor(device_id: str) -> str:
    return base64.urlsafe_b64encode(device_id.encode()).decode().rstrip("=")


def _uncursor(text: str) -> str:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise UserError("the cursor is invalid; use `next` of the previous page") from None


async def scan(
    fleet: Fleet, admits: Callable[[DeviceRecord], bool], after: str = ""
) -> AsyncIterator[DeviceView]:
    """Every device whose record is admitted, tombstones included, in the order of the ids. Yields to the event
    loop."""
    began = time.monotonic()
    for device_id in sorted([one for one in fleet.records.slug_by_id if one > after]):
        if time.monotonic() - began > YIELD_S:
            await asyncio.sleep(0)
            began = time.monotonic()
        record = fleet.records.get(fleet.records.slug_by_id.get(device_id, Slug("")))
        if record is not None and admits(record):
            fleet.verdicts.refresh(record.slug)
            view = fleet.views.device(record.slug)
            if view is not None:
                yield view


async def page_of(
    request: web.Request, as_item: Callable[[Fleet, DeviceView], dict[str, object] | None]
) -> web.Response:
    """A page of the devices that match the query. `as_item`: the JSON of a device; None = leave it out."""
    check_query(request, set(LIST_QUERY), {"label"})
    limit = whole_number(request, "limit", DEFAULT_ITEMS, 1, MAX_ITEMS)
    wanted = _filter(request)
    fleet = request.app[CONTEXT].fleet
    fleet.records.check_loaded()
    items: list[dict[str, object]] = []
    following: str | None = None
    last = ""
    async for view in scan(fleet, wanted.admits, wanted.after):
        if wanted.verdict is not None and view.verdict.state is not wanted.verdict:
            continue
        item = as_item(fleet, view)
        if item is None:
            continue
        if len(items) == limit:
            following = _cursor(last)
            break
        items.append(item)
        last = view.record.device.id
    return json_response({"items": items, "next": following, "index": fleet.records.index})
