"""The configuration of the running service: read it again."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.errors import NotFoundError


async def reload(request: web.Request) -> web.StreamResponse:
    """As SIGHUP, and the answer says what changed. Raises UserError (400) that names what is wrong with the
    configuration."""
    reloads = request.app[CONTEXT].reloads
    if reloads is None:
        raise NotFoundError("this server has no configuration to read again")
    done = await reloads.reload()
    audit(request, "reload", "reloaded")
    return json_response(
        {
            "changed": list(done.changed),
            "needs_restart": list(done.needs_restart),
            "unprepared_classes": dict(done.unprepared),
        }
    )
