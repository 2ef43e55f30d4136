"""The route table: every operation of the API, from which the router and its description are made."""

from __future__ import annotations

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
    hosts,
    migrations,
    openapi,
    pagination,
    pauses,
    peers,
    plan,
    pools,
    rebalance,
    reload,
    rollouts,
    status_page,
    webhook,
)
from nomad_watchdog.api import (
    leases as sharing,
)
from nomad_watchdog.api.answers import AnyOut, BulkOut, DeviceChange, DeviceOut, DevicePage
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.routing import Route
from nomad_watchdog.api.schemas import (
    BulkIn,
    ConfirmIn,
    EventsIn,
    HeartbeatsIn,
    MigrateIn,
    PauseIn,
    PoolScaleIn,
    ReplicatedReportsIn,
    ReportIn,
    TargetIn,
    WebhookIn,
)
from nomad_watchdog.core.roles import Right
from nomad_watchdog.device_fields import DeviceIn


async def status(request: web.Request) -> web.StreamResponse:
    return json_response({**request.app[CONTEXT].fleet.views.status(), "version": __version__})


async def healthz(_request: web.Request) -> web.StreamResponse:
    return json_response({"alive": True})


async def ready(request: web.Request) -> web.StreamResponse:
    fleet = request.app[CONTEXT].fleet
    # Even if the registry is lost or can't be read now: agents and operators must still reach this replica.
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
        "Register or update a device; stored before the response",
        {200: DeviceChange, 201: DeviceChange},
        body=DeviceIn,
        needs=Right.CHANGE,
    ),
    Route(
        "DELETE",
        "/v1/devices/{id}",
        devices.delete_device,
        "Deregister a device; stored before the response",
        {200: DeviceChange},
        needs=Right.CHANGE,
        query=devices.DELETE_QUERY,
    ),
    Route(
        "POST",
        "/v1/devices:bulk",
        devices.bulk,
        "Register and deregister many devices; one result per item",
        {200: BulkOut},
        body=BulkIn,
        needs=Right.CHANGE,
    ),
    Route(
        "POST",
        "/v1/devices/{id}/heartbeat",
        heartbeats.heartbeat,
        "A heartbeat; kept in memory only",
        {204: "recorded"},
        needs=Right.CHANGE,
    ),
    Route(
        "POST",
        "/v1/heartbeats",
        heartbeats.heartbeats,
        "Heartbeats of up to 10,000 devices; the response lists unknown ones",
        {200: AnyOut},
        body=HeartbeatsIn,
        needs=Right.CHANGE,
    ),
    Route("GET", "/v1/pauses", pauses.list_pauses, "Pauses and maintenance windows", {200: AnyOut}),
    Route(
        "POST",
        "/v1/pauses",
        pauses.add_pause,
        "Pause actions for devices, now or in a window; stored before the response",
        {201: AnyOut},
        body=PauseIn,
        needs=Right.OPERATE,
    ),
    Route(
        "POST",
        "/v1/pauses:resume",
        pauses.resume_targets,
        "End the pauses of exactly these",
        {200: AnyOut},
        body=TargetIn,
        needs=Right.OPERATE,
    ),
    Route(
        "DELETE",
        "/v1/pauses/{id}",
        pauses.remove_pause,
        "End a pause or window",
        {200: AnyOut},
        needs=Right.OPERATE,
    ),
    Route(
        "GET",
        "/v1/migration",
        migrations.list_migrations,
        "Migrations between schedulers, and their progress",
        {200: AnyOut},
    ),
    Route(
        "POST",
        "/v1/migration",
        migrations.begin_migration,
        "Move agents to another scheduler; stored before the response",
        {200: "of a dry run: what would move", 201: AnyOut, 409: "another one is in progress"},
        body=MigrateIn,
        needs=Right.OPERATE,
    ),
    *(
        Route(
            "POST",
            f"/v1/migration:{what}",
            handler,
            summary,
            {
                200: AnyOut,
                404: "no migration is in progress",
                409: "not possible in its current state",
            },
            needs=Right.OPERATE,
        )
        for what, handler, summary in (
            (
                "pause",
                migrations.pause_migration,
                "Stop starting new moves; moves in progress finish",
            ),
            ("resume", migrations.resume_migration, "Resume a paused migration"),
            ("undo", migrations.undo_migration, "Move the agents back"),
        )
    ),
    *rollouts.ROUTES,
    *rebalance.ROUTES,
    Route(
        "GET",
        "/v1/departures",
        holds.departures,
        "Departures that are on hold because too many devices would leave at once",
        {200: AnyOut},
    ),
    Route(
        "POST",
        "/v1/departures:confirm",
        holds.confirm_departures,
        "Approve the departures on hold",
        {202: AnyOut, 409: "none are on hold, or others than those of `id`"},
        body=ConfirmIn,
        needs=Right.OPERATE,
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
        "An event of a gateway; signed (Standard Webhooks) if secrets are configured",
        {
            200: DeviceChange,
            201: DeviceChange,
            409: "older than the last change, or the id was used for another body",
        },
        body=WebhookIn,
        needs=Right.CHANGE,
        signed=True,
    ),
    Route(
        "POST",
        "/v1/agents/report",
        agents.receive_report,
        "An agent's report",
        {
            200: AnyOut,
            409: "not decidable yet: send it again after Retry-After seconds",
            410: "not the accepted agent: stop",
        },
        body=ReportIn,
        needs=Right.REPORT,
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
        "/v1/hosts",
        hosts.list_hosts,
        "Hosts with their agents, state and pressure, by name",
        {200: AnyOut},
    ),
    Route(
        "GET",
        "/v1/events",
        events.list_events,
        "Events, oldest first",
        {200: AnyOut},
        query=events.QUERY,
    ),
    Route(
        "GET",
        "/v1/incidents",
        events.list_incidents,
        "Incidents: the open ones, then the last closed ones",
        {200: AnyOut},
        query=events.INCIDENTS_QUERY,
    ),
    Route("GET", "/v1/plan", plan.plan, "What the next pass would do", {200: AnyOut}),
    Route(
        "POST",
        "/v1/plan:confirm",
        holds.confirm_stops,
        "Approve the stops that the mass-change breaker has put on hold; the next pass does them",
        {202: AnyOut, 409: "none are on hold, or others than those of `id`"},
        body=ConfirmIn,
    ),
    Route(
        "POST",
        "/v1/config:reload",
        reload.reload,
        "Reload the configuration, and apply what can be applied at run time",
        {200: AnyOut, 400: "the configuration is invalid; nothing has changed"},
    ),
    Route("GET", "/v1/pools", pools.list_pools, "Pools and their workers", {200: AnyOut}),
    Route(
        "POST",
        "/v1/pools/{id}/scale",
        pools.scale_pool,
        "Set the number of workers, within the bounds of the pool",
        {200: AnyOut, 409: "another scaler controls it, or another replica controls the pools"},
        body=PoolScaleIn,
    ),
    Route(
        "DELETE",
        "/v1/pools/{id}",
        pools.remove_pool,
        "Stop a pool that is no longer configured",
        {200: AnyOut, 409: "it is configured, or another replica controls the pools"},
    ),
    Route(
        "GET", "/v1/leases", sharing.list_leases, "Which replica holds which shard", {200: AnyOut}
    ),
    Route(
        "POST",
        "/v1/peers/reports",
        peers.receive_reports,
        "Reports that another replica has accepted",
        {200: AnyOut},
        body=ReplicatedReportsIn,
    ),
    Route(
        "POST",
        "/v1/peers/events",
        peers.receive_events,
        "Events that only another replica has observed, for publication",
        {200: AnyOut, 409: "another replica publishes events"},
        body=EventsIn,
    ),
    Route("GET", "/v1/openapi.json", describe, "This description", {200: AnyOut}),
    Route("GET", "/healthz", healthz, "The process is alive", {200: AnyOut}, public=True),
    Route(
        "GET",
        "/ready",
        ready,
        "Whether the fleet has been read",
        {200: AnyOut, 503: "not yet; see `reason`"},
        public=True,
    ),
    Route("GET", "/metrics", metrics_text, "Metrics for Prometheus", {200: "text format"}),
    Route(
        "GET",
        "/artifacts/watchdog-agent.pyz",
        artifact.agent_artifact,
        "The agent as one file",
        {200: "a zip application"},
        public=True,  # a Nomad client fetches it without a token; it contains no secret
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
