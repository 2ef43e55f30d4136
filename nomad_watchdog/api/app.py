"""The application: its route table, and the few handlers that are too small for a module."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from aiohttp import web

from nomad_watchdog import __version__
from nomad_watchdog.api import (
    agent_artifact as artifact,
)
from nomad_watchdog.api import (
    agents,
    devices,
    events,
    heartbeats,
    holds,
    migrations,
    openapi,
    pagination,
    pauses,
    peers,
    plan,
    pools,
    reload,
    services,
    status_page,
    webhook,
)
from nomad_watchdog.api import (
    leases as sharing,
)
from nomad_watchdog.api.auth import Authenticator
from nomad_watchdog.api.body_memory import BodyMemory
from nomad_watchdog.api.context import CONTEXT, Context
from nomad_watchdog.api.malformed import MALFORMED, MalformedRequests
from nomad_watchdog.api.middleware import boundary
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.routing import Route
from nomad_watchdog.api.schemas import (
    AnyOut,
    BulkIn,
    BulkOut,
    ConfirmIn,
    DeviceChange,
    DeviceOut,
    DevicePage,
    EventsIn,
    HearsayIn,
    HeartbeatsIn,
    MigrateIn,
    PauseIn,
    PoolScaleIn,
    ReportIn,
    TargetIn,
    WebhookIn,
)
from nomad_watchdog.core.roles import Right
from nomad_watchdog.device_fields import DeviceIn
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.replicas.leases import Leases

BODY_MEMORY: Final = 32 * 1024 * 1024
"""Bytes that all request bodies may take together; more if the largest one is larger than a quarter of it."""


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
    """The API of this fleet. `artifact`: the agent as one file, offered to nodes; `operator`: who takes
    the word that held stops are meant; `leases`: who knows which replica reconciles what; `door`: who may
    come in, by default everybody."""
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
        # HEAD: the same headers without the body, which aiohttp leaves out by itself (RFC 9110, 9.3.2).
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
            routed = app.router.add_route(method, route.resource, route.handler)
            app[CONTEXT].routed[routed] = route
    metrics.routes(route.path for route in ROUTES)
    app.on_shutdown.append(events.stop_following)
    app.on_cleanup.append(_close)
    return app


async def _close(app: web.Application) -> None:
    app[MALFORMED].close()


async def status(request: web.Request) -> web.StreamResponse:
    return json_response({**request.app[CONTEXT].fleet.views.status(), "version": __version__})


async def healthz(_request: web.Request) -> web.StreamResponse:
    return json_response({"alive": True})


async def ready(request: web.Request) -> web.StreamResponse:
    fleet = request.app[CONTEXT].fleet
    # While the registry is gone or can't be read the status is not ready, but who reports here or looks must reach us.
    known = fleet.readiness.event.is_set()
    answer = {"ready": known, "reason": "" if known else fleet.readiness.reason}
    if known and not fleet.readiness.ready:
        answer["warning"] = fleet.readiness.reason
    return json_response(answer, status=200 if known else 503)


async def metrics_text(request: web.Request) -> web.StreamResponse:
    body = request.app[CONTEXT].metrics.render()
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return web.Response(body=body, headers={"Content-Type": kind})


async def describe(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    return json_response(openapi.describe(context.routes, secured=context.authenticator.guarded))


ROUTES: Final = (
    Route("GET", "/v1/status", status, "Summary of the fleet", {200: AnyOut}),
    Route(
        "GET",
        "/v1/devices",
        devices.list_devices,
        "Devices in the order of their ids",
        {200: DevicePage},
        query=pagination.LIST_QUERY,
    ),
    Route("GET", "/v1/devices/{id}", devices.get_device, "One device", {200: DeviceOut}),
    Route(
        "PUT",
        "/v1/devices/{id}",
        devices.put_device,
        "Have a device watched; durable when answered",
        {200: DeviceChange, 201: DeviceChange},
        body=DeviceIn,
        asks=Right.CHANGE,
    ),
    Route(
        "DELETE",
        "/v1/devices/{id}",
        devices.delete_device,
        "Stop watching a device; durable when answered",
        {200: DeviceChange},
        asks=Right.CHANGE,
        query=devices.DELETE_QUERY,
    ),
    Route(
        "POST",
        "/v1/devices:bulk",
        devices.bulk,
        "Many wishes at once, each answered by itself",
        {200: BulkOut},
        body=BulkIn,
        asks=Right.CHANGE,
    ),
    Route(
        "POST",
        "/v1/devices/{id}/heartbeat",
        heartbeats.heartbeat,
        "A sign of life; kept in memory only",
        {204: "noted"},
        asks=Right.CHANGE,
    ),
    Route(
        "POST",
        "/v1/heartbeats",
        heartbeats.heartbeats,
        "Signs of life of up to 10,000 devices; names those that are unknown",
        {200: AnyOut},
        body=HeartbeatsIn,
        asks=Right.CHANGE,
    ),
    Route("GET", "/v1/pauses", pauses.list_pauses, "Pauses and maintenance windows", {200: AnyOut}),
    Route(
        "POST",
        "/v1/pauses",
        pauses.add_pause,
        "Keep hands off devices, now or in a window; durable when answered",
        {201: AnyOut},
        body=PauseIn,
        asks=Right.OPERATE,
    ),
    Route(
        "POST",
        "/v1/pauses:resume",
        pauses.resume,
        "End the pauses of exactly these",
        {200: AnyOut},
        body=TargetIn,
        asks=Right.OPERATE,
    ),
    Route(
        "DELETE",
        "/v1/pauses/{id}",
        pauses.remove_pause,
        "End a pause or window",
        {200: AnyOut},
        asks=Right.OPERATE,
    ),
    Route(
        "GET",
        "/v1/migration",
        migrations.show,
        "What was moved from one scheduler to another, and how far it has come",
        {200: AnyOut},
    ),
    Route(
        "POST",
        "/v1/migration",
        migrations.begin,
        "Move devices' agents to another scheduler; durable when answered",
        {200: "what would move, of a dry run", 201: AnyOut, 409: "another one is under way"},
        body=MigrateIn,
        asks=Right.OPERATE,
    ),
    *(
        Route(
            "POST",
            f"/v1/migration:{what}",
            handler,
            summary,
            {200: AnyOut, 404: "none is under way", 409: "it makes no sense now"},
            asks=Right.OPERATE,
        )
        for what, handler, summary in (
            ("pause", migrations.pause, "Move no further device; those on their way arrive"),
            ("resume", migrations.resume, "Go on where a pause began"),
            ("undo", migrations.undo, "Move back what has been moved"),
        )
    ),
    Route(
        "GET",
        "/v1/departures",
        holds.departures,
        "Devices that are held from leaving because they are too many at once",
        {200: AnyOut},
    ),
    Route(
        "POST",
        "/v1/departures:confirm",
        holds.confirm_departures,
        "Let those leave who are held",
        {202: AnyOut, 409: "nobody is held, or others than `id` names"},
        body=ConfirmIn,
        asks=Right.OPERATE,
    ),
    Route(
        "GET",
        "/v1/devices/{id}/explain",
        devices.explain_device,
        "Why a device is in its state",
        {200: AnyOut},
    ),
    Route(
        "POST",
        "/v1/webhook",
        webhook.webhook,
        "A gateway's event; signed (Standard Webhooks) where secrets are configured",
        {
            200: DeviceChange,
            201: DeviceChange,
            409: "older than the last change, or an id that was used for another body",
        },
        body=WebhookIn,
        asks=Right.CHANGE,
        signed=True,
    ),
    Route(
        "POST",
        "/v1/agents/report",
        agents.report,
        "An agent's report",
        {
            200: AnyOut,
            409: "not decidable yet: again after Retry-After seconds",
            410: "not the accepted agent: stop",
        },
        body=ReportIn,
        asks=Right.REPORT,
    ),
    Route(
        "GET",
        "/v1/agents",
        agents.list_agents,
        "Agents in the order of their devices' ids",
        {200: AnyOut},
        query=pagination.LIST_QUERY,
    ),
    Route(
        "GET",
        "/v1/events",
        events.list_events,
        "What happened, oldest first",
        {200: AnyOut},
        query=events.QUERY,
    ),
    Route(
        "GET",
        "/v1/incidents",
        events.list_incidents,
        "Changes of many devices with one cause: the open ones, then the last closed ones",
        {200: AnyOut},
        query=events.INCIDENTS_QUERY,
    ),
    Route("GET", "/v1/plan", plan.plan, "What the next pass would do", {200: AnyOut}),
    Route(
        "POST",
        "/v1/plan:confirm",
        holds.confirm_stops,
        "Let the stops go that the mass-change breaker holds; the next pass does them",
        {202: AnyOut, 409: "nothing is held, or other stops than `id` names"},
        body=ConfirmIn,
    ),
    Route(
        "POST",
        "/v1/config:reload",
        reload.reload,
        "Read the configuration again, and apply what can be applied at run time",
        {200: AnyOut, 400: "the configuration is not valid; nothing has changed"},
    ),
    Route("GET", "/v1/pools", pools.list_pools, "Pools and their workers", {200: AnyOut}),
    Route(
        "POST",
        "/v1/pools/{id}/scale",
        pools.scale_pool,
        "Have so many workers, within the pool's bounds",
        {200: AnyOut, 409: "another scaler has it, or another replica keeps the pools"},
        body=PoolScaleIn,
    ),
    Route(
        "DELETE",
        "/v1/pools/{id}",
        pools.remove_pool,
        "Stop a pool that is no longer configured",
        {200: AnyOut, 409: "it is configured, or another replica keeps the pools"},
    ),
    Route("GET", "/v1/leases", sharing.list_leases, "Who reconciles which shard", {200: AnyOut}),
    Route(
        "POST",
        "/v1/peers/reports",
        peers.overhear,
        "What agents said to another replica",
        {200: AnyOut},
        body=HearsayIn,
    ),
    Route(
        "POST",
        "/v1/peers/events",
        peers.tell,
        "What another replica alone has seen, to be told for all",
        {200: AnyOut, 409: "another replica tells"},
        body=EventsIn,
    ),
    Route("GET", "/v1/openapi.json", describe, "This description", {200: AnyOut}),
    Route("GET", "/healthz", healthz, "The process is alive", {200: AnyOut}, public=True),
    Route(
        "GET",
        "/ready",
        ready,
        "The fleet is known",
        {200: AnyOut, 503: "not yet; `reason` says why"},
        public=True,
    ),
    Route("GET", "/metrics", metrics_text, "Metrics for Prometheus", {200: "text format"}),
    Route(
        "GET",
        "/artifacts/watchdog-agent.pyz",
        artifact.agent_artifact,
        "The agent as one file",
        {200: "a zip application"},
        public=True,  # a Nomad client fetches it and has no token; it holds no secret
    ),
    Route(
        "GET",
        "/artifacts/{id}/watchdog-agent.pyz",
        artifact.agent_file,
        "The agent file with this SHA-256, of this version or an earlier one",
        {200: "a zip application"},
        public=True,
    ),
    Route("GET", "/", status_page.status_page, "Status page", {200: "HTML"}),
)
