"""Departures that are held, and their confirmation."""

from __future__ import annotations

import logging

from aiohttp import web

from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import ConfirmIn
from nomad_watchdog.controllers.expiry import ExpiryController
from nomad_watchdog.errors import ConflictError, NotFoundError


def _departures(request: web.Request) -> ExpiryController:
    found = request.app[CONTEXT].departures
    if found is None:
        raise NotFoundError("nobody lets devices leave here")
    return found


log = logging.getLogger(__name__)


async def held(request: web.Request) -> web.StreamResponse:
    return json_response(_departures(request).shown())


async def confirm(request: web.Request) -> web.StreamResponse:
    """Let those leave who are held, if they are still those that were shown.

    Raises ConflictError (409) when nobody is held, or others than `id` names."""
    body = await read(request, ConfirmIn)
    found = _departures(request)
    now = found.held_id
    if not now:
        raise ConflictError("no departures are held; there is nothing to confirm")
    if body.id != now:
        raise ConflictError(
            f"other departures are held now, under the id {now}; look at them before you confirm"
        )
    count = found.confirm()
    log.warning("departures confirmed", extra={"count": count, "held_id": now})
    audit(request, "confirm-departures", "confirmed", held_id=now, count=count)
    return json_response({"confirmed": count, "id": now}, status=202)
