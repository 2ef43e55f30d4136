"""What replicas send each other: accepted reports, and events."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import EventsIn, HearsayIn
from nomad_watchdog.errors import NotFoundError, UserError


async def overhear(request: web.Request) -> web.StreamResponse:
    """Reports that another replica has accepted: taken where our own record says the same; and devices
    that it heard."""
    body = await read(request, HearsayIn)
    fleet = request.app[CONTEXT].fleet
    fleet.presence.touch_many(body.beats)
    taken = sum(fleet.reports.accept_replicated(one.report()) for one in body.reports)
    return json_response({"taken": taken})


async def tell(request: web.Request) -> web.StreamResponse:
    """Events of another replica, to be told for all. Raises ConflictError (409) where another tells."""
    body = await read(request, EventsIn)
    feed = request.app[CONTEXT].feed
    if feed is None:
        raise NotFoundError("nobody tells events for others here")
    try:
        return json_response({"taken": feed.take(body.events)})
    except ValueError as error:
        raise UserError(str(error)) from None
