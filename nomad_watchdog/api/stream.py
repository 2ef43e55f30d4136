"""Events: a page of them, or a stream that goes on."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from aiohttp import web

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.devices import check_query, whole_number
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.errors import UserError

MOST_FOLLOWERS: Final = 64
BEAT_S: Final = 15.0
"""An empty line so often, so that both sides notice a dead connection."""
WRITE_TIMEOUT_S: Final = 10.0
"""A reader that takes nothing for so long is let go (S9)."""
MOST_EVENTS: Final = 1_000
NDJSON: Final = "application/x-ndjson"

QUERY: Final = {
    "since": "only events after this sequence number (default 0)",
    "limit": f"1 to {MOST_EVENTS}, default 100; how many at once when following",
    "follow": "true: one JSON object a line (application/x-ndjson), without end",
}


async def list_events(request: web.Request) -> web.StreamResponse:
    """Oldest first. A gap in `seq` means that older events were dropped."""
    check_query(request, set(QUERY))
    since = whole_number(request, "since", 0, 0, 2**53)
    limit = whole_number(request, "limit", 100, 1, MOST_EVENTS)
    follow = request.query.get("follow", "false")
    if follow not in {"true", "false", "1", "0"}:
        raise UserError(f"follow is {ascii(follow)[:40]}; allowed are: true, false")
    if follow in {"true", "1"} and request.method == "HEAD":
        return web.Response(content_type=NDJSON)
    if follow in {"true", "1"}:
        return await _follow(request, since, limit)
    events, following = request.app[CONTEXT].fleet.events(since, limit)
    return web.json_response({"items": [event.shown() for event in events], "next": following})


async def _follow(request: web.Request, since: int, limit: int) -> web.StreamResponse:
    followers = request.app[CONTEXT].followers
    if len(followers) >= MOST_FOLLOWERS:
        raise RequestError(
            503,
            "too_many_followers",
            f"{MOST_FOLLOWERS} followers are the most; ask without follow",
            {"Retry-After": "30"},
        )
    task = asyncio.current_task()
    assert task is not None
    followers.add(task)
    try:
        return await _stream(request, since, limit)
    finally:
        followers.discard(task)


async def _stream(request: web.Request, since: int, limit: int) -> web.StreamResponse:
    fleet = request.app[CONTEXT].fleet
    response = web.StreamResponse(headers={"Cache-Control": "no-store"})
    response.content_type = NDJSON
    await response.prepare(request)
    try:
        while True:
            events, since = fleet.events(since, limit)
            lines = "".join(json.dumps(event.shown()) + "\n" for event in events)
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await response.write((lines or "\n").encode())
            if len(events) < limit:
                await fleet.wait_event(since, BEAT_S)
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
