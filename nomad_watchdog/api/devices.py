"""Devices: list, get, register, deregister, in bulk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

from aiohttp import web
from pydantic import ValidationError

from nomad_watchdog.api.answers import BulkResult
from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.auth import ACTOR, check_prefix, permit_of
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.device_quota import QuotaClaim
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.api.name_checks import check_class, known_before, missing, unknown
from nomad_watchdog.api.pagination import check_query, page_of
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import MAX_BULK, BulkEnvelope
from nomad_watchdog.clock import steps
from nomad_watchdog.core.event_order import SignedEvent, is_replay
from nomad_watchdog.core.roles import Right, may
from nomad_watchdog.device_fields import DeviceIn, DeviceItem, problem
from nomad_watchdog.errors import ConflictError, UserError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.records import Registered
from nomad_watchdog.fleet.serializers import placement_json
from nomad_watchdog.fleet.views import DeviceView
from nomad_watchdog.ids import MAX_ID_BYTES, DeviceId, parse_device_id, slug_of
from nomad_watchdog.model import (
    Departure,
    Device,
    DeviceRecord,
    PlacementState,
    Presence,
)
from nomad_watchdog.secret_values import hide_in

DELETE_QUERY: Final = {
    "now": "true (default): stop its agent immediately; false: keep it for `presence.grace`",
}


def device_id_of(request: web.Request) -> DeviceId:
    """The id in the path. Decoded here, because the router leaves some escapes undecoded."""
    raw = request.rel_url.raw_path.split("/")[3]
    try:
        text = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise UserError("the device id in the path is not percent-encoded UTF-8") from None
    return parse_device_id(text)


def device_json(fleet: Fleet, view: DeviceView) -> dict[str, object]:
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
        **fleet.presence.serialize(record),
    }


def change_json(record: DeviceRecord, *, changed: bool) -> dict[str, object]:
    """The result of a write."""
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
    return await page_of(request, device_json)


async def get_device(request: web.Request) -> web.StreamResponse:
    fleet = request.app[CONTEXT].fleet
    device_id = device_id_of(request)
    slug = slug_of(device_id)
    fleet.verdicts.refresh(slug)
    view = fleet.views.device(slug)
    if view is None:
        raise await missing(fleet, device_id)
    return json_response(device_json(fleet, view))


async def explain_device(request: web.Request) -> web.StreamResponse:
    device_id = device_id_of(request)
    fleet = request.app[CONTEXT].fleet
    slug = slug_of(device_id)
    fleet.verdicts.refresh(slug)
    explained = fleet.views.explain(slug) or await _explain_stray(fleet, device_id)
    if not explained:
        raise await missing(fleet, device_id)
    return json_response(hide_in(explained))


async def _explain_stray(fleet: Fleet, device_id: DeviceId) -> dict[str, object]:
    """The explanation of an unregistered device that has agents; else nothing."""
    slug = slug_of(device_id)
    found = fleet.placements.get(slug, ())
    live = sum(placement.state is not PlacementState.DEAD for placement in found)
    if not live:
        return {}
    before = await known_before(fleet, device_id)
    agents = "1 agent of it runs" if live == 1 else f"{live} agents of it run"
    return {
        "id": device_id,
        "slug": slug,
        "verdict": None,
        "reason": f"the device is not registered, but {agents}" + (f"; {before}" if before else ""),
        "desired": None,
        "observed": [placement_json(placement) for placement in found],
        "events": [event.shown() for event in fleet.events.all.of_device(slug)],
    } | fleet.views.explain_parts(slug)


async def put_device(request: web.Request) -> web.StreamResponse:
    device_id = device_id_of(request)
    body = await read(request, DeviceIn)
    device = body.device(device_id)
    check_class(request.app[CONTEXT].fleet, device, given=body.names_class)
    return await store(request, device, "register")


async def store(
    request: web.Request, device: Device, verb: str, event: SignedEvent | None = None
) -> web.Response:
    """Register or update a device; 201 if it was not present. `verb`: the name for the audit event."""
    check_prefix(request, device.id)
    fleet = request.app[CONTEXT].fleet
    before = fleet.views.device(slug_of(device.id))
    if before is None or before.record.device != device:
        fleet.presence.ensure_not_from_inventory(device.id)
    with QuotaClaim(request) as claim:
        claim.check(device.id)
        (done,) = await fleet.records.register(
            [device], event=event, permit=permit_of(request), token=claim.token
        )
    fleet.presence.touch([device.id])
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


def _readable(request: web.Request) -> Fleet | None:
    """The fleet, if the caller may read all ids, so that an error may suggest a similar one."""
    role = request[ACTOR].role
    return request.app[CONTEXT].fleet if role is not None and may(role, Right.READ) else None


async def remove(
    request: web.Request,
    device_id: DeviceId,
    verb: str,
    left: Departure,
    event: SignedEvent | None = None,
) -> web.Response:
    """Deregister a device. Raises NotFoundError if it was never registered."""
    check_prefix(request, device_id)
    fleet = request.app[CONTEXT].fleet
    fleet.presence.ensure_not_from_inventory(device_id)
    (done,) = await fleet.records.deregister(
        [device_id], left, event=event, permit=permit_of(request)
    )
    if done is None:
        raise unknown(device_id, _readable(request))
    if done.changed:
        audit(request, verb, "removed", device_id, left=left.value)
    return _changed(done, event, 200)


def _changed(done: Registered, event: SignedEvent | None, status: int) -> web.Response:
    answer = change_json(done.record, changed=done.changed)
    # Decided by the record alone, so that it also works after a restart and on another replica.
    answer["duplicate"] = bool(event and not done.written and is_replay(done.record, event))
    return json_response(answer, status=status)


async def bulk(request: web.Request) -> web.StreamResponse:
    """Each item is checked separately. Valid items are stored even if others are invalid."""
    body = await read(request, BulkEnvelope)
    if len(body.devices) + len(body.delete) > MAX_BULK:
        raise UserError(
            f"{len(body.devices) + len(body.delete)} items; the maximum is {MAX_BULK} per request"
        )
    results: list[BulkResult] = []
    seen: set[str] = set()
    fleet, permit = request.app[CONTEXT].fleet, permit_of(request)
    with QuotaClaim(request) as claim:
        puts = await _puts(body.devices, results, seen, fleet, permit, claim)
        stored = (
            await fleet.records.register(list(puts.values()), permit=permit, token=claim.token)
            if puts
            else []
        )
    deletes = await _deletes(request, body.delete, results, seen, permit)
    async for some in steps([device.id for device in puts.values()]):
        fleet.presence.touch(some)
    for at, done in zip(puts, stored, strict=True):
        results[at].changed = done.changed
    left = await fleet.records.deregister(list(deletes.values()), permit=permit) if deletes else []
    for at, was in zip(deletes, left, strict=True):
        results[at].changed = was is not None and was.changed
        if was is None:
            results[at].status, results[at].error = (
                404,
                str(unknown(deletes[at], _readable(request))),
            )
    changed = [str(result.id) for result in results if result.changed]
    if changed:
        audit(request, "bulk", "changed", devices=changed, items=len(results), changed=len(changed))
    items = [one.model_dump() async for some in steps(results) for one in some]
    return json_response({"results": items})


async def _puts(
    items: Sequence[object],
    results: list[BulkResult],
    seen: set[str],
    fleet: Fleet,
    permit: Callable[[Device], None],
    claim: QuotaClaim,
) -> dict[int, Device]:
    """The devices to register, by the position of their result; results are appended."""
    puts: dict[int, Device] = {}
    async for some in steps(items):
        for item in some:
            index = len(results)
            try:
                body = DeviceItem.model_validate(item)
                device = body.device(_once(body.id, seen))
                check_class(fleet, device, given=body.names_class)
                _check_put(fleet, device, permit)
                claim.check(device.id)
                puts[index] = device
                results.append(BulkResult(id=body.id, action="put", index=index, status=200))
            except (ValidationError, UserError, ConflictError, RequestError) as error:
                found = item.get("id") if isinstance(item, dict) else None
                results.append(_refused("put", index, found, error))
    return puts


async def _deletes(
    request: web.Request,
    items: Sequence[object],
    results: list[BulkResult],
    seen: set[str],
    permit: Callable[[Device], None],
) -> dict[int, DeviceId]:
    """As `_puts`, for the devices to remove."""
    deletes: dict[int, DeviceId] = {}
    fleet, before = request.app[CONTEXT].fleet, len(results)
    async for some in steps(items):
        for gone in some:
            index = len(results) - before
            try:
                device_id = _once(parse_device_id(gone), seen)
                check_prefix(request, device_id)
                _check_delete(fleet, device_id, permit)
                deletes[len(results)] = device_id
                results.append(BulkResult(id=device_id, action="delete", index=index, status=200))
            except (UserError, ConflictError, RequestError) as error:
                results.append(_refused("delete", index, gone, error))
    return deletes


def _check_put(fleet: Fleet, device: Device, permit: Callable[[Device], None]) -> None:
    permit(device)
    known = fleet.records.get(slug_of(device.id))
    if known is not None:
        permit(known.device)
    if known is None or known.device != device:
        fleet.presence.ensure_not_from_inventory(device.id)


def _check_delete(fleet: Fleet, device_id: DeviceId, permit: Callable[[Device], None]) -> None:
    known = fleet.records.get(slug_of(device_id))
    if known is not None:
        permit(known.device)
    fleet.presence.ensure_not_from_inventory(device_id)


def _once(device_id: str, seen: set[str]) -> DeviceId:
    if device_id in seen:
        raise UserError("the same device is named more than once in this request")
    seen.add(device_id)
    return DeviceId(device_id)


def _refused(
    action: str, index: int, found: object, error: ValidationError | WatchdogError | RequestError
) -> BulkResult:
    status = 400
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, WatchdogError):
        status = error.http_status
    return BulkResult(
        id=found[:MAX_ID_BYTES] if isinstance(found, str) else None,
        action="put" if action == "put" else "delete",
        index=index,
        status=status,
        error=problem(error, DeviceItem) if isinstance(error, ValidationError) else str(error),
    )
