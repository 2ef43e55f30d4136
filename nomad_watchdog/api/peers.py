"""What replicas send each other: accepted reports, and events."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import EventsIn, ReplicatedReportsIn
from nomad_watchdog.errors import NotFoundError, UserError


async def receive_reports(request: web.Request) -> web.StreamResponse:
    """Reports that another replica has accepted, and heartbeats that it has received. A report is accepted here if
    this replica's own record agrees."""
    body = await read(request, ReplicatedReportsIn)
    fleet = request.app[CONTEXT].fleet
    fleet.presence.touch_many(body.beats)
    taken = sum(fleet.reports.accept_replicated(one.report()) for one in body.reports)
    return json_response({"taken": taken})


async def receive_events(request: web.Request) -> web.StreamResponse:
    """Events of another replica, for publication. Raises ConflictError (409) if another replica publishes."""
    body = await read(request, EventsIn)
    feed = request.app[CONTEXT].feed
    if feed is None:
        raise NotFoundError("this replica publishes no events of others")
    try:
        return json_response({"taken": feed.publish_of_peer(body.events)})
    except ValueError as error:
        raise UserError(str(error)) from None
