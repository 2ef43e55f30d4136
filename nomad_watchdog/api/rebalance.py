"""Rebalancing: agents move from hosts with many agents to hosts with few."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from nomad_watchdog.api.answers import AnyOut
from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.name_checks import check_class_name
from nomad_watchdog.api.routing import Route
from nomad_watchdog.api.schemas import RebalanceIn
from nomad_watchdog.controllers.rebalance_requests import RebalanceRequests
from nomad_watchdog.core.rebalance import Rebalance
from nomad_watchdog.core.roles import Right
from nomad_watchdog.errors import NotFoundError, TransientError
from nomad_watchdog.fleet.pauses import new_id


def _rebalances(request: web.Request) -> RebalanceRequests:
    context = request.app[CONTEXT]
    if context.rebalances is None:
        raise NotFoundError("this server has no controller for rebalances")
    if not context.fleet.readiness.ready:
        raise TransientError("the fleet has not been read yet", retry_after_s=1.0)
    return context.rebalances


async def show_rebalance(request: web.Request) -> web.StreamResponse:
    """The last rebalance, and the number of agents per host."""
    return web.json_response(await _rebalances(request).view())


async def begin_rebalance(request: web.Request) -> web.StreamResponse:
    """Start a rebalance.

    Raises ConflictError (409) while another one is in progress or agents run on several schedulers, TransientError (503)
    before the fleet has been read."""
    body = await read(request, RebalanceIn)
    context = request.app[CONTEXT]
    rebalances = _rebalances(request)
    if body.agent_class:
        check_class_name(context.fleet, body.agent_class)
    by = request[ACTOR].name
    new = Rebalance(
        id=new_id(),
        began=context.fleet.clock.wall(),
        by=f"{by} ({body.by})" if body.by else by,
        target=body.target(),
        most=body.most,
    )
    if body.dry_run:
        return web.json_response(await rebalances.preview(new))
    begun = await rebalances.begin(new)
    audit(request, "rebalance", "started", rebalance=new.id)
    return web.json_response(begun, status=201)


async def pause_rebalance(request: web.Request) -> web.StreamResponse:
    return await _change(request, "pause")


async def resume_rebalance(request: web.Request) -> web.StreamResponse:
    return await _change(request, "resume")


async def abort_rebalance(request: web.Request) -> web.StreamResponse:
    return await _change(request, "abort")


async def _change(request: web.Request, what: str) -> web.StreamResponse:
    changed = await _rebalances(request).control(what)
    audit(request, "rebalance", what, rebalance=changed["id"])
    return web.json_response(changed)


ROUTES: Final = (
    Route(
        "GET",
        "/v1/rebalance",
        show_rebalance,
        "The last rebalance, and the number of agents per host",
        {200: AnyOut},
    ),
    Route(
        "POST",
        "/v1/rebalance",
        begin_rebalance,
        "Move agents to hosts that have fewer; stored before the response",
        {200: "of a dry run: what would move", 201: AnyOut, 409: "another one is in progress"},
        body=RebalanceIn,
        needs=Right.OPERATE,
    ),
    *(
        Route(
            "POST",
            f"/v1/rebalance:{what}",
            handler,
            summary,
            {200: AnyOut, 404: "no rebalance is in progress", 409: "it is not paused"},
            needs=Right.OPERATE,
        )
        for what, handler, summary in (
            (
                "pause",
                pause_rebalance,
                "Stop starting new moves; moves in progress finish",
            ),
            ("resume", resume_rebalance, "Resume a paused rebalance"),
            ("abort", abort_rebalance, "End the rebalance; agents stay where they are"),
        )
    ),
)
