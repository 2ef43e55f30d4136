"""Events: a page or a stream."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from aiohttp import web

from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.api.middleware import HEADERS
from nomad_watchdog.api.name_checks import check_events_of
from nomad_watchdog.api.pagination import check_query, whole_number
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.core.roles import Role
from nomad_watchdog.errors import TransientError, UserError
from nomad_watchdog.events.log import EventFilter, EventLog
from nomad_watchdog.fast_json import as_json
from nomad_watchdog.ids import Slug, parse_device_id
from nomad_watchdog.model import VerdictState

log = logging.getLogger(__name__)

MAX_FOLLOWERS: Final = 64
"""Maximum number of event streams of all callers of one role, and of replicas."""
REPLICA: Final = "replica"
BEAT_S: Final = 15.0
"""Interval of empty lines, by which both sides notice a dead connection."""
WRITE_TIMEOUT_S: Final = 10.0
"""The stream of a client that reads nothing for this time is closed (S9, isolation)."""
MAX_EVENTS: Final = 1_000
NDJSON: Final = "application/x-ndjson"

FILTERS: Final = {
    "device": "only events about the device of this id",
    "kind": "only kinds with this prefix: verdict, verdict.offline, breaker",
    "verdict": f"only changes to this verdict: {', '.join(VerdictState)}",
    "within_s": "only events of this many last seconds, by the server's clock",
}
QUERY: Final = {
    "since": "only events after this sequence number (default 0)",
    **FILTERS,
    "limit": f"1 to {MAX_EVENTS}, default 100; with follow the batch size",
    "follow": "true: an endless stream of one JSON object per line (application/x-ndjson)",
    "own": "true: events that this replica observed, with its own numbers; false (default): the published events of all",
    "marks": "true: opened incidents have the numbers of the events that they explain; for replicas",
}


INCIDENTS_QUERY: Final = {"open": "true, false or any (default)"}


async def list_events(request: web.Request) -> web.StreamResponse:
    """Oldest first. A gap in `seq` means that older events were dropped, or that the service crashed.

    Raises NotFoundError (404) for a device that was never registered and has no stored event."""
    check_query(request, set(QUERY))
    since = whole_number(request, "since", 0, 0, 2**53)
    limit = whole_number(request, "limit", 100, 1, MAX_EVENTS)
    follow, marks = _flag(request, "follow"), _flag(request, "marks")
    history = _history(request)
    if device := request.query.get("device", ""):
        await check_events_of(request.app[CONTEXT].fleet, parse_device_id(device))
    if marks and request[ACTOR].role is not Role.OPERATOR:
        raise RequestError(
            403, "forbidden", "marks=true is for replicas, which have the role operator"
        )
    if follow and request.method == "HEAD":
        return web.Response(content_type=NDJSON)
    if follow:
        return await _follow(request, since, limit)
    events, following = await history.page(since, limit, _filter(request))
    items = [event.shown(marks=marks) for event in events]
    return json_response({"items": items, "next": following})


def _flag(request: web.Request, name: str) -> bool:
    text = request.query.get(name, "false")
    if text not in {"true", "false", "1", "0"}:
        raise UserError(f"{name} is {ascii(text)[:40]}; allowed are: true, false")
    return text in {"true", "1"}


def _history(request: web.Request) -> EventLog:
    fleet = request.app[CONTEXT].fleet
    return fleet.events.own if _flag(request, "own") else fleet.events.all


def _filter(request: web.Request) -> EventFilter:
    verdict = request.query.get("verdict", "")
    if verdict and verdict not in {state.value for state in VerdictState}:
        raise UserError(f"verdict is {ascii(verdict)[:40]}; allowed are: {', '.join(VerdictState)}")
    within_s = whole_number(request, "within_s", 0, 1, 2**32)
    now = request.app[CONTEXT].fleet.clock.wall()
    return EventFilter(
        device=request.query.get("device", ""),
        kind=request.query.get("kind", ""),
        verdict=verdict,
        not_before=now - within_s if within_s else 0.0,
    )


async def list_incidents(request: web.Request) -> web.StreamResponse:
    """The open ones, then the last closed ones."""
    check_query(request, set(INCIDENTS_QUERY))
    wanted = request.query.get("open", "any")
    if wanted not in {"true", "false", "any"}:
        raise UserError(f"open is {ascii(wanted)[:40]}; allowed are: true, false, any")
    fleet = request.app[CONTEXT].fleet

    def device_of(slug: Slug) -> str:
        record = fleet.records.get(slug)
        return record.device.id if record is not None else ""

    found = [
        fleet.recorder.incidents.serialize(i, device_of) for i in fleet.recorder.incidents.all()
    ]
    items = [item for item in found if wanted == "any" or item["open"] == (wanted == "true")]
    return json_response({"items": items})


async def _follow(request: web.Request, since: int, limit: int) -> web.StreamResponse:
    context, actor = request.app[CONTEXT], request[ACTOR]
    followers, most = context.followers, context.authenticator.streams_per_token
    share = REPLICA if _flag(request, "marks") else str(actor.role)
    if (
        share != REPLICA
        and actor.known
        and sum(f == (actor.client, share) for f in followers.values()) >= most
    ):
        raise RequestError(
            429,
            "too_many_followers",
            f"this token already has {most} event streams (api.streams_per_token); end one, or send the "
            "request without follow",
            {"Retry-After": "30"},
        )
    if sum(of == share for _, of in followers.values()) >= MAX_FOLLOWERS:
        raise RequestError(
            503,
            "too_many_followers",
            f"callers of the role {share} already have {MAX_FOLLOWERS} event streams; send the request without "
            "follow, or retry later",
            {"Retry-After": "30"},
        )
    task = asyncio.current_task()
    assert task is not None
    followers[task] = (actor.client, share)
    try:
        return await _stream(request, since, limit)
    finally:
        followers.pop(task, None)


async def _stream(request: web.Request, since: int, limit: int) -> web.StreamResponse:
    history, wanted, marks = _history(request), _filter(request), _flag(request, "marks")
    response = web.StreamResponse(headers=HEADERS)
    response.content_type = NDJSON
    await response.prepare(request)
    try:
        while True:
            try:
                events, since = await history.page(since, limit, wanted)
            except TransientError as error:
                # A part of the response has been sent, so it can only be ended; the client reconnects.
                log.warning("event stream ends", extra={"reason": str(error)})
                return response
            lines = b"".join(as_json(event.shown(marks=marks)) + b"\n" for event in events)
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await response.write(lines or b"\n")
            if len(events) < limit:
                await history.wait(since, BEAT_S)
    except (ConnectionError, TimeoutError):
        if request.transport is not None:
            request.transport.abort()
    return response


async def stop_following(app: web.Application) -> None:
    """End all streams, so that a shutdown does not wait for them."""
    followers = list(app[CONTEXT].followers)
    for task in followers:
        task.cancel()
    await asyncio.gather(*followers, return_exceptions=True)
