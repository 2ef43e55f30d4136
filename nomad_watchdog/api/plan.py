"""The plan, and an operator's word on the stops that the mass-change breaker holds (S7)."""

from __future__ import annotations

import logging

from aiohttp import web

from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import ConfirmIn
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.ids import Slug

log = logging.getLogger(__name__)


async def plan(request: web.Request) -> web.StreamResponse:
    return json_response(request.app[CONTEXT].fleet.views.plan())


async def confirm(request: web.Request) -> web.StreamResponse:
    """Let the held stops go, if they are still those that were shown.

    Raises ConflictError (409) when nothing is held, or others than `id` names."""
    body = await read(request, ConfirmIn)
    context = request.app[CONTEXT]
    operator = context.operator
    if operator is not None:
        operator.hold_now()
    if operator is None or not operator.breaker.held:
        raise ConflictError("no stops are held; there is nothing to confirm")
    now, reason = operator.breaker.held_id, operator.breaker.reason
    if body.id != now:
        raise ConflictError(
            f"other stops are held now: {len(operator.breaker.held)} under the id {now}; "
            "look at them before you confirm"
        )
    count = operator.confirm_stops()
    log.warning("stops confirmed", extra={"count": count, "held_id": now, "reason": reason})
    context.fleet.events.own.add(
        at=context.fleet.clock.wall(),
        kind="breaker.confirmed",
        device_id="",
        slug=Slug(""),
        text=f"an operator confirmed {count} stops",
        data={"held_id": now},
    )
    audit(request, "confirm", "confirmed", held_id=now, stops=count)
    return json_response({"confirmed": count, "id": now}, status=202)
