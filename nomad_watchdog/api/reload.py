"""Reload of the configuration."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.errors import NotFoundError


async def reload(request: web.Request) -> web.StreamResponse:
    """As SIGHUP; the response lists the changes. Raises UserError (400) with the errors in the configuration."""
    reloads = request.app[CONTEXT].reloads
    if reloads is None:
        raise NotFoundError("this server can't reload its configuration")
    done = await reloads.reload()
    audit(request, "reload", "reloaded")
    return json_response(
        {
            "changed": list(done.changed),
            "needs_restart": list(done.needs_restart),
            "unprepared_classes": dict(done.unprepared),
        }
    )
