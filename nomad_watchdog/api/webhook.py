"""Events of gateways: signed or with a token, applied once (S5, idempotence)."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.auth import ACTOR, promote
from nomad_watchdog.api.body import parsed, read, read_body
from nomad_watchdog.api.connection_limits import Rank
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.devices import change_json, remove, store
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
    """Has the effect of PUT (connected), or of DELETE with `now=false` (disconnected): the agent of a device that
    returns within the grace period is kept.

    If secrets are configured, a request without a token must be signed (else 401). A repeated id has no effect:
    200 with `duplicate`, or 409 if the body differs."""
    context = request.app[CONTEXT]
    secrets, headers = context.authenticator.webhook_secrets, _signature_headers(request)
    clock = context.fleet.clock
    if secrets is None or headers is None:
        return await _apply(request, await read(request, WebhookIn), None)
    try:
        check_form(headers, clock.wall())
        body = await read_body(request)
        signed = verify(secrets.now(clock.monotonic()), headers, body, clock.wall())
    except SignatureError as error:
        raise RequestError(
            401, "unauthorized", str(error), {"WWW-Authenticate": "Bearer"}
        ) from None
    promote(request, Rank.KNOWN)
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


def _signature_headers(request: web.Request) -> tuple[str, str, str] | None:
    """ID, timestamp and signature; None if a token authenticates the request."""
    headers, signature = request.headers, request.headers.get("webhook-signature", "")
    if request.app[CONTEXT].authenticator.webhook_secrets is None or (
        request[ACTOR].known and not signature
    ):
        return None
    return headers.get("webhook-id", ""), headers.get("webhook-timestamp", ""), signature


async def _apply(
    request: web.Request, body: WebhookIn, signed: SignatureHeaders | None
) -> web.Response:
    event = event_order.SignedEvent(signed.id, signed.at) if signed is not None else None
    device = body.device
    device_id = DeviceId(device.id)
    if body.event == "disconnected":
        return await remove(request, device_id, "webhook", Departure.DISCONNECTED, event)
    if device.address is None:
        raise RequestError(400, "invalid_body", "device.address: required when a device connects")
    try:
        address = device_address(device.address)
    except UserError as error:
        raise RequestError(400, "invalid_body", f"device.address: {error}") from None
    ttl_s = None if device.ttl is None else parse_duration(device.ttl)
    desired = Device(device_id, device.agent_class, address, dict(device.labels), ttl_s)
    given = "agent_class" in device.model_fields_set
    check_class(request.app[CONTEXT].fleet, desired, given=given)
    return await store(request, desired, "webhook", event)


def _duplicate(fleet: Fleet, body: WebhookIn) -> web.Response:
    record = fleet.records.get(slug_of(DeviceId(body.device.id)))
    known = {} if record is None else change_json(record, changed=False)
    return json_response({"id": body.device.id, **known, "duplicate": True})
