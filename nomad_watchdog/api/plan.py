"""The plan."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response


async def plan(request: web.Request) -> web.StreamResponse:
    return json_response(request.app[CONTEXT].fleet.views.plan())
