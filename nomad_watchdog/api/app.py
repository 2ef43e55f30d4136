"""The web application: its state, and its routes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from aiohttp import web

from nomad_watchdog.api import events, services
from nomad_watchdog.api.auth import Authenticator
from nomad_watchdog.api.body_memory import BodyMemory
from nomad_watchdog.api.context import CONTEXT, Context
from nomad_watchdog.api.malformed import MALFORMED, MalformedRequests
from nomad_watchdog.api.middleware import boundary
from nomad_watchdog.api.routes import ROUTES
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.replicas.leases import Leases

BODY_MEMORY: Final = 32 * 1024 * 1024
"""Maximum bytes of all request bodies in memory, or four times the maximum of one body if that is more."""


def make_app(
    fleet: Fleet,
    *,
    metrics: Metrics,
    artifact: Path | None,
    max_body_bytes: int = 1024 * 1024,
    operator: services.Operator | None = None,
    leases: Leases | None = None,
    authenticator: Authenticator | None = None,
) -> web.Application:
    """The API of this fleet. `artifact`: the agent's file, which nodes download. `operator`: approves held stops.
    `authenticator`: by default one that allows everything to every caller."""
    app = web.Application(middlewares=[boundary], client_max_size=max_body_bytes)
    app[MALFORMED] = MalformedRequests(metrics)
    app[CONTEXT] = Context(
        fleet=fleet,
        metrics=metrics,
        artifact=artifact,
        max_body_bytes=max_body_bytes,
        bodies=BodyMemory(max(BODY_MEMORY, 4 * max_body_bytes), fleet.clock.monotonic),
        authenticator=authenticator or Authenticator(),
        routes=ROUTES,
        operator=operator,
        leases=leases,
    )
    for route in ROUTES:
        # HEAD: the same headers without the body, which aiohttp omits (RFC 9110, 9.3.2).
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            routed = app.router.add_route(method, route.resource, route.handler)
            app[CONTEXT].routed[routed] = route
    metrics.routes(route.path for route in ROUTES)
    app.on_shutdown.append(events.stop_following)
    app.on_cleanup.append(_close)
    return app


async def _close(app: web.Application) -> None:
    app[MALFORMED].close()
