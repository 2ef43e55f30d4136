"""A gateway's event: signed or with a token, applied once (S5)."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.auth import ACTOR, rise
from nomad_watchdog.api.body import parsed, read, read_body
from nomad_watchdog.api.connection_limits import Rank
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.devices import remove, shown_change, store
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.api.name_checks import check_class
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import WebhookIn
from nomad_watchdog.core import event_order
from nomad_watchdog.core.webhook_signature import (
    Seen,
    SignatureError,
    SignatureHeaders,
    check_form,
    verify,
)
from nomad_watchdog.device_address import device_address
from nomad_watchdog.errors import ConflictError, UserError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Departure, Device
from nomad_watchdog.units import parse_duration


async def webhook(request: web.Request) -> web.StreamResponse:
    """The same effect as PUT (connected), and as DELETE with `now=false` (disconnected): a device that
    blinks keeps its agent for the grace.

    Where secrets are configured, a call without a token must be signed; 401 if it is not. A repeated id
    has no effect: 200 with `duplicate`, or 409 when it comes with another body."""
    context = request.app[CONTEXT]
    secrets, told, clock = (
        context.authenticator.webhook_secrets,
        _told(request),
        context.fleet.clock,
    )
    if secrets is None or told is None:
        return await _apply(request, await read(request, WebhookIn), None)
    try:
        check_form(told, clock.wall())
        body = await read_body(request)
        signed = verify(secrets.now(clock.monotonic()), told, body, clock.wall())
    except SignatureError as error:
        raise RequestError(
            401, "unauthorized", str(error), {"WWW-Authenticate": "Bearer"}
        ) from None
    rise(request, Rank.KNOWN)
    window, now = context.authenticator.window, clock.wall()
    match window.claim(signed, body, now):
        case Seen.DONE:
            return _duplicate(context.fleet, parsed(body, WebhookIn))
        case Seen.OTHER:
            raise RequestError(409, "conflict", "this webhook-id was used for another body")
        case Seen.BUSY:
            raise ConflictError("the same event is being applied")
    done = False
    try:
        answer = await _apply(request, parsed(body, WebhookIn), signed)
        done = True
    finally:
        window.settle(signed, done=done)
    return answer


def _told(request: web.Request) -> tuple[str, str, str] | None:
    """The headers that sign it; None where a token stands for it."""
    headers, signature = request.headers, request.headers.get("webhook-signature", "")
    if request.app[CONTEXT].authenticator.webhook_secrets is None or (
        request[ACTOR].known and not signature
    ):
        return None
    return headers.get("webhook-id", ""), headers.get("webhook-timestamp", ""), signature


async def _apply(
    request: web.Request, said: WebhookIn, signed: SignatureHeaders | None
) -> web.Response:
    event = event_order.SignedEvent(signed.id, signed.at) if signed is not None else None
    device = said.device
    device_id = DeviceId(device.id)
    if said.event == "disconnected":
        return await remove(request, device_id, "webhook", Departure.DISCONNECTED, event)
    if device.address is None:
        raise RequestError(400, "invalid_body", "device.address: needed when a device connects")
    try:
        address = device_address(device.address)
    except UserError as error:
        raise RequestError(400, "invalid_body", f"device.address: {error}") from None
    ttl_s = None if device.ttl is None else parse_duration(device.ttl)
    wish = Device(device_id, device.agent_class, address, dict(device.labels), ttl_s)
    given = "agent_class" in device.model_fields_set
    check_class(request.app[CONTEXT].fleet, wish, given=given)
    return await store(request, wish, "webhook", event)


def _duplicate(fleet: Fleet, said: WebhookIn) -> web.Response:
    record = fleet.records.get(slug_of(DeviceId(said.device.id)))
    known = {} if record is None else shown_change(record, changed=False)
    return json_response({"id": said.device.id, **known, "duplicate": True})
