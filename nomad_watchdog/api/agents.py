"""Agents: their reports, and their state."""

from __future__ import annotations

from typing import Final

from aiohttp import web
from watchdog_agent import wire

from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.api.pagination import page_of
from nomad_watchdog.api.responses import error_response, json_response
from nomad_watchdog.api.schemas import MAX_AGE_S, MAX_REPORT, ReportIn
from nomad_watchdog.core.acceptance import AcceptanceKind
from nomad_watchdog.core.agent_token import TokenClaim
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.views import DeviceView
from nomad_watchdog.model import Report
from nomad_watchdog.replicas.report_addresses import ReportAddresses

RETRY_S: Final = 2
"""Seconds after which an agent repeats a report that could not be decided."""


async def receive_report(request: web.Request) -> web.StreamResponse:
    """S1 (one accepted agent): 200 accepted, 410 stop, 409 repeat later; 403 for the credential of another agent."""
    report = (await read(request, ReportIn, MAX_REPORT)).report()
    claim = request[ACTOR].claim
    if claim is not None and claim != TokenClaim(report.slug, report.epoch):
        error = RequestError(403, "forbidden", "this credential is for another device or epoch")
        error.claim = TokenClaim(report.slug, report.epoch)
        raise error
    fleet = request.app[CONTEXT].fleet
    result = await fleet.reports.receive(report)
    if result.kind is AcceptanceKind.ACCEPTED:
        return json_response(_accepted(request, fleet, report))
    if result.kind is AcceptanceKind.REFUSED:
        code = wire.DEPARTED if result.departed else "refused"
        return error_response(410, code, result.reason)
    return error_response(409, "unsure", result.reason, {"Retry-After": str(RETRY_S)})


def _accepted(request: web.Request, fleet: Fleet, report: Report) -> dict[str, object]:
    asks = {"pressure": True} if fleet.pressures.asks(report.slug) else {}
    placements = fleet.placements.get(report.slug, ())
    if fleet.trials.holds_repairs(report.slug, report.epoch, placements):
        asks["hold_repairs"] = True
    return {"accepted": True, **_replicas(request), **_condition(fleet, report), **asks}


def _condition(fleet: Fleet, report: Report) -> dict[str, object]:
    """The condition of the device that the agent's predecessor found, if the agent has not determined it yet."""
    found = fleet.reports.inherited(report)
    if found is None:
        return {}
    age_s = min(max(0.0, fleet.clock.wall() - found.since), MAX_AGE_S)
    return {
        "condition": {
            "state": found.state.value,
            "age_s": round(age_s, 3),
            "reason": found.reason,
            "misses": found.misses,
        }
    }


def _replicas(request: web.Request) -> dict[str, list[str]]:
    """The addresses of all replicas, if there are several: they change while an agent runs."""
    leases = request.app[CONTEXT].leases
    found = ReportAddresses(leases).addresses() if leases is not None else ()
    return {"api": list(found)} if len(found) > 1 else {}


async def list_agents(request: web.Request) -> web.StreamResponse:
    return await page_of(request, _agent_json)


def _agent_json(fleet: Fleet, view: DeviceView) -> dict[str, object] | None:
    placement, report = view.placement, view.report
    if placement is None and report is None:
        return None
    return {
        "id": view.record.device.id,
        "slug": view.record.slug,
        "class": view.record.device.agent_class,
        "epoch": placement.epoch if placement is not None else view.record.epoch,
        "instance": view.record.instance,
        "node": placement.node if placement is not None else "",
        "placement_state": placement.state.value if placement is not None else None,
        "restarts": placement.restarts if placement is not None else 0,
        "ready": report.ready if report is not None else False,
        "state": report.state.value if report is not None else None,
        "version": report.version if report is not None else "",
        "listen": report.listen if report is not None else "",
        "report_age_s": None
        if report is None
        else round(fleet.clock.monotonic() - report.received_at, 1),
        "consul": view.health.status if view.health is not None else None,
    }
