"""Devices: list, read, wish, bulk."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from aiohttp import web
from pydantic import ValidationError
from watchdog_agent.digits import whole

from nomad_watchdog.api.answers import json_response
from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.door import check_prefix, permit_of
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.api.known import check_class, unknown
from nomad_watchdog.api.schemas import (
    MOST_BULK,
    BulkEnvelope,
    BulkResult,
    DeviceIn,
    DeviceItem,
    problem,
    read,
)
from nomad_watchdog.core.events import Event, is_replay
from nomad_watchdog.errors import ConflictError, UserError, WatchdogError
from nomad_watchdog.fleet import DeviceView, Fleet
from nomad_watchdog.ids import DeviceId, parse_device_id, slug_of
from nomad_watchdog.ledger import Registered
from nomad_watchdog.model import (
    Departure,
    Device,
    DeviceRecord,
    PlacementState,
    Presence,
    VerdictState,
)
from nomad_watchdog.shown import shown_placement

MOST_ITEMS: Final = 1_000
DEFAULT_ITEMS: Final = 100
_BREATH: Final = 200
"""Devices looked at before others get their turn on the event loop."""

DELETE_QUERY: Final = {
    "now": "true (default): its agent goes at once; false: it stays for `presence.grace`",
}
LIST_QUERY: Final = {
    "class": "only devices of this agent class",
    "verdict": f"only this verdict: {', '.join(VerdictState)}",
    "presence": "present (default), absent or any",
    "label": "key=value; may be given several times, all must match",
    "q": "text that the id or address holds",
    "limit": f"1 to {MOST_ITEMS}, default {DEFAULT_ITEMS}",
    "cursor": "`next` of the page before",
}


def device_id_of(request: web.Request) -> DeviceId:
    """The id in the path, decoded by us: the router would let some escapes through undecoded."""
    raw = request.rel_url.raw_path.split("/")[3]
    try:
        text = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise UserError("the device id in the path is not percent-encoded UTF-8") from None
    return parse_device_id(text)


def check_query(
    request: web.Request, allowed: Collection[str], repeatable: Collection[str] = ()
) -> None:
    """Refuse parameters that we do not know, or that are given twice: silence would mislead."""
    for name in request.query:
        if name not in allowed:
            raise UserError(
                f"unknown query parameter {ascii(name)[:60]}; allowed are: {', '.join(sorted(allowed)) or 'none'}"
            )
        if name not in repeatable and len(request.query.getall(name)) > 1:
            raise UserError(f"query parameter {name} is given more than once")


def whole_number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """A query parameter that is a number from low to high."""
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

    def admits(self, view: DeviceView) -> bool:
        device = view.record.device
        return (
            device.id > self.after
            and (self.presence is None or view.record.presence is self.presence)
            and (self.agent_class is None or device.agent_class == self.agent_class)
            and (self.verdict is None or view.verdict.state is self.verdict)
            and all(device.labels.get(key) == value for key, value in self.labels)
            and (self.text in device.id.casefold() or self.text in device.address.casefold())
        )


def _filter(request: web.Request) -> _Filter:
    query = request.query
    labels = [label.partition("=") for label in query.getall("label", [])]
    if not all(equals for _, equals, _ in labels):
        raise UserError("label must be key=value")
    presence = query.get("presence", "present")
    if presence not in {*Presence, "any"}:
        raise UserError(f"presence is {ascii(presence)[:40]}; allowed are: present, absent, any")
    verdict = query.get("verdict")
    if verdict is not None and verdict not in set(VerdictState):
        raise UserError(f"verdict is {ascii(verdict)[:40]}; allowed are: {', '.join(VerdictState)}")
    return _Filter(
        agent_class=query.get("class"),
        verdict=None if verdict is None else VerdictState(verdict),
        presence=None if presence == "any" else Presence(presence),
        labels=tuple((key, value) for key, _, value in labels),
        text=query.get("q", "").casefold(),
        after=_uncursor(query.get("cursor", "")),
    )


def _cursor(device_id: str) -> str:
    return base64.urlsafe_b64encode(device_id.encode()).decode().rstrip("=")


def _uncursor(text: str) -> str:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise UserError("cursor is not one that was given as `next`") from None


async def _breathing(fleet: Fleet) -> AsyncIterator[DeviceView]:
    for number, view in enumerate(fleet.views()):
        if number % _BREATH == _BREATH - 1:
            await asyncio.sleep(0)
        yield view


async def page_of(
    request: web.Request, shown: Callable[[Fleet, DeviceView], dict[str, object] | None]
) -> web.Response:
    """A page of what `shown` makes of the devices that the query admits (None = leave out)."""
    check_query(request, set(LIST_QUERY), {"label"})
    limit = whole_number(request, "limit", DEFAULT_ITEMS, 1, MOST_ITEMS)
    wanted = _filter(request)
    fleet = request.app[CONTEXT].fleet
    items: list[dict[str, object]] = []
    following: str | None = None
    last = ""
    async for view in _breathing(fleet):
        if not wanted.admits(view):
            continue
        item = shown(fleet, view)
        if item is None:
            continue
        if len(items) == limit:
            following = _cursor(last)
            break
        items.append(item)
        last = view.record.device.id
    return json_response({"items": items, "next": following, "index": fleet.index})


def shown_device(fleet: Fleet, view: DeviceView) -> dict[str, object]:
    """The public fields of a device."""
    record, placement, report = view.record, view.placement, view.report
    age_s = None
    if placement is not None and placement.created_at > 0:
        age_s = round(max(0.0, fleet.clock.wall() - placement.created_at), 1)
    return {
        "id": record.device.id,
        "slug": record.slug,
        "class": record.device.agent_class,
        "address": record.device.address,
        "labels": dict(record.device.labels),
        "presence": record.presence.value,
        "generation": record.generation,
        "epoch": record.epoch,
        "verdict": view.verdict.state.value,
        "reason": view.verdict.reason,
        "since_s": round(view.since_s, 1),
        "node": placement.node if placement is not None else "",
        "version": report.version if report is not None else "",
        "agent_age_s": age_s,
        "placement_state": placement.state.value if placement is not None else None,
        "instance": record.instance,
        **fleet.shown_presence(record),
    }


def shown_change(record: DeviceRecord, *, changed: bool) -> dict[str, object]:
    """What a write did to a record."""
    return {
        "id": record.device.id,
        "slug": record.slug,
        "changed": changed,
        "generation": record.generation,
        "epoch": record.epoch,
        "presence": record.presence.value,
        "duplicate": False,
    }


async def list_devices(request: web.Request) -> web.StreamResponse:
    return await page_of(request, shown_device)


async def get_device(request: web.Request) -> web.StreamResponse:
    fleet = request.app[CONTEXT].fleet
    device_id = device_id_of(request)
    view = fleet.view(slug_of(device_id))
    if view is None:
        raise unknown(device_id, fleet)
    return json_response(shown_device(fleet, view))


async def explain_device(request: web.Request) -> web.StreamResponse:
    device_id = device_id_of(request)
    fleet = request.app[CONTEXT].fleet
    explained = fleet.explain(slug_of(device_id)) or _explain_stray(fleet, device_id)
    if not explained:
        raise unknown(device_id, fleet)
    return json_response(explained)


def _explain_stray(fleet: Fleet, device_id: DeviceId) -> dict[str, object]:
    """Of a device that nobody has registered although agents of it are there; else nothing."""
    slug = slug_of(device_id)
    found = fleet.placements.get(slug, ())
    live = sum(placement.state is not PlacementState.DEAD for placement in found)
    if not live:
        return {}
    return {
        "id": device_id,
        "slug": slug,
        "verdict": None,
        "reason": f"no such device is registered, and {live} of its agents are there",
        "desired": None,
        "observed": [shown_placement(placement) for placement in found],
        "events": [event.shown() for event in fleet.told.of_device(slug)],
    } | {name: value for part in fleet.explain_parts for name, value in part(slug).items()}


async def put_device(request: web.Request) -> web.StreamResponse:
    device_id = device_id_of(request)
    body = await read(request, DeviceIn)
    device = body.device(device_id)
    check_class(request.app[CONTEXT].fleet, device, given=body.names_class)
    return await store(request, device, "register")


async def store(
    request: web.Request, device: Device, verb: str, event: Event | None = None
) -> web.Response:
    """Ask for a device to be watched; 201 when it was not. verb: as the audit names it."""
    check_prefix(request, device.id)
    fleet = request.app[CONTEXT].fleet
    before = fleet.view(slug_of(device.id))
    if before is None or before.record.device != device:
        fleet.own(device.id)
    (done,) = await fleet.register([device], event=event, permit=permit_of(request))
    fleet.sign([device.id])
    new = done.changed and (before is None or before.record.presence is Presence.ABSENT)
    if done.changed:
        audit(request, verb, "created" if new else "changed", device.id)
    return _changed(done, event, 201 if new else 200)


async def delete_device(request: web.Request) -> web.StreamResponse:
    check_query(request, DELETE_QUERY)
    now = request.query.get("now", "true")
    if now not in ("true", "false"):
        raise UserError(f"now is {ascii(now)[:40]}; true or false is allowed")
    left = Departure.REMOVED if now == "true" else Departure.DISCONNECTED
    return await remove(request, device_id_of(request), "deregister", left)


async def remove(
    request: web.Request,
    device_id: DeviceId,
    verb: str,
    left: Departure,
    event: Event | None = None,
) -> web.Response:
    """Say that a device has left; NotFoundError for one that never was."""
    check_prefix(request, device_id)
    fleet = request.app[CONTEXT].fleet
    fleet.own(device_id)
    (done,) = await fleet.deregister([device_id], left, event=event, permit=permit_of(request))
    if done is None:
        raise unknown(device_id)
    if done.changed:
        audit(request, verb, "removed", device_id, left=left.value)
    return _changed(done, event, 200)


def _changed(done: Registered, event: Event | None, status: int) -> web.Response:
    shown = shown_change(done.record, changed=done.changed)
    # Known from the record alone: after a restart, or on another replica than the first time.
    shown["duplicate"] = bool(event and not done.written and is_replay(done.record, event))
    return json_response(shown, status=status)


async def bulk(request: web.Request) -> web.StreamResponse:
    """Each item is checked by itself; the good ones are stored whatever the others are."""
    body = await read(request, BulkEnvelope)
    if len(body.devices) + len(body.delete) > MOST_BULK:
        raise UserError(
            f"{len(body.devices) + len(body.delete)} items; at most {MOST_BULK} are allowed at once"
        )
    results: list[BulkResult] = []
    puts: dict[int, Device] = {}
    deletes: dict[int, DeviceId] = {}
    seen: set[str] = set()
    fleet, permit = request.app[CONTEXT].fleet, permit_of(request)
    for index, item in enumerate(body.devices):
        try:
            wish = DeviceItem.model_validate(item)
            device = wish.device(_once(wish.id, seen))
            check_class(fleet, device, given=wish.names_class)
            _check_put(fleet, device, permit)
            puts[len(results)] = device
            results.append(BulkResult(id=wish.id, action="put", index=index, status=200))
        except (ValidationError, UserError, ConflictError, RequestError) as error:
            found = item.get("id") if isinstance(item, dict) else None
            results.append(_refused("put", index, found, error))
    for index, gone in enumerate(body.delete):
        try:
            device_id = _once(parse_device_id(gone), seen)
            check_prefix(request, device_id)
            _check_delete(fleet, device_id, permit)
            deletes[len(results)] = device_id
            results.append(BulkResult(id=gone, action="delete", index=index, status=200))
        except (UserError, ConflictError, RequestError) as error:
            results.append(_refused("delete", index, gone, error))
    stored = await fleet.register(list(puts.values()), permit=permit) if puts else []
    fleet.sign([device.id for device in puts.values()])
    for at, done in zip(puts, stored, strict=True):
        results[at].changed = done.changed
    left = await fleet.deregister(list(deletes.values()), permit=permit) if deletes else []
    for at, was in zip(deletes, left, strict=True):
        results[at].changed = was is not None and was.changed
        if was is None:
            results[at].status, results[at].error = 404, str(unknown(deletes[at]))
    changed = sum(result.changed for result in results)
    if changed:
        audit(request, "bulk", "changed", items=len(results), changed=changed)
    return json_response({"results": [result.model_dump() for result in results]})


def _check_put(fleet: Fleet, device: Device, permit: Callable[[Device], None]) -> None:
    permit(device)
    known = fleet.records.get(slug_of(device.id))
    if known is not None:
        permit(known.device)
    if known is None or known.device != device:
        fleet.own(device.id)


def _check_delete(fleet: Fleet, device_id: DeviceId, permit: Callable[[Device], None]) -> None:
    known = fleet.records.get(slug_of(device_id))
    if known is not None:
        permit(known.device)
    fleet.own(device_id)


def _once(device_id: str, seen: set[str]) -> DeviceId:
    if device_id in seen:
        raise UserError("the same device is named more than once in this request")
    seen.add(device_id)
    return DeviceId(device_id)


def _refused(
    action: str, index: int, found: object, error: ValidationError | WatchdogError | RequestError
) -> BulkResult:
    status = error.status if isinstance(error, RequestError) else 400
    return BulkResult(
        id=found[:MOST_ITEMS] if isinstance(found, str) else None,
        action="put" if action == "put" else "delete",
        index=index,
        status=409 if isinstance(error, ConflictError) else status,
        error=problem(error, DeviceItem) if isinstance(error, ValidationError) else str(error),
    )
