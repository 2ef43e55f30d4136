"""Pauses and maintenance windows."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.name_checks import check_class_name, check_devices
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import PauseIn, TargetIn
from nomad_watchdog.core.pauses import Pause
from nomad_watchdog.errors import NotFoundError, UserError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.pauses import new_id
from nomad_watchdog.fleet.presence import pause_json
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import WallTime
from nomad_watchdog.units import parse_duration

MAX_AHEAD_S: Final = 366 * 86400.0


def _shown(fleet: Fleet, pause: Pause) -> dict[str, object]:
    now = fleet.clock.wall()
    covered = sum(pause.target.matches(record.device) for record in fleet.records.values())
    return pause_json(pause) | {"active": pause.is_active(now), "covers": covered}


async def list_pauses(request: web.Request) -> web.StreamResponse:
    """Those that are not over, in the order of their making."""
    fleet = request.app[CONTEXT].fleet
    await fleet.presence.pauses.refresh()
    now = fleet.clock.wall()
    items = [_shown(fleet, pause) for pause in fleet.presence.pauses.all if not pause.is_over(now)]
    return json_response({"items": items})


async def add_pause(request: web.Request) -> web.StreamResponse:
    """Durable when answered. The same target again moves the end of the pause that there is.

    Raises NotFoundError (404) for devices that were never registered, UserError (400) for a class that is
    not configured and that no device has."""
    body = await read(request, PauseIn)
    fleet = request.app[CONTEXT].fleet
    now = fleet.clock.wall()
    begins = now if body.begins is None else body.begins.timestamp()
    ends = body.until.timestamp() if body.until is not None else None
    if body.lasts is not None:
        ends = begins + parse_duration(body.lasts)
    what = "maintenance window" if body.window else "pause"
    if ends is not None and ends <= max(begins, now):
        raise UserError(f"the {what} would be over before it begins; choose a later end")
    if max(begins, ends or 0.0) > now + MAX_AHEAD_S:
        raise UserError(f"a {what} may lie at most 366 days ahead")
    await check_devices(fleet, body.devices)
    if body.agent_class:
        check_class_name(fleet, body.agent_class)
    pause = Pause(
        id=new_id(),
        target=body.target(),
        begins=WallTime(begins),
        ends=None if ends is None else WallTime(ends),
        reason=body.reason,
        by=_by(request, body.by),
        window=body.window,
    )
    kept = await fleet.presence.pauses.add(pause)
    what = "maintenance" if kept.window else "pause"
    by = f" by {kept.by}" if kept.by else ""
    text = f"{what} {kept.id}{by}: {kept.reason or 'no reason given'}"
    _note(fleet, "paused", text, {"pause": kept.id})
    audit(request, "pause", "paused", pause=kept.id)
    return json_response(_shown(fleet, kept), status=201)


async def resume(request: web.Request) -> web.StreamResponse:
    """End the pauses of exactly this target; devices are taken out of the lists that name them.

    Raises NotFoundError (404) when no such pause is there: it says which one covers the device."""
    body = await read(request, TargetIn)
    fleet = request.app[CONTEXT].fleet
    if not await fleet.presence.pauses.resume(body.target()):
        others = ", ".join(pause.id for pause in fleet.presence.pauses.in_force())
        raise NotFoundError(
            "no pause of exactly these is in force"
            + (
                f"; there are others: {others} (they end by their own target or id)"
                if others
                else ""
            )
        )
    _note(fleet, "resumed", "a pause was ended", body.model_dump(mode="json", by_alias=True))
    audit(request, "resume", "resumed")
    return json_response({"resumed": True})


async def remove_pause(request: web.Request) -> web.StreamResponse:
    """End one by its id."""
    pause_id = request.match_info["id"]
    fleet = request.app[CONTEXT].fleet
    if not await fleet.presence.pauses.remove(pause_id):
        raise NotFoundError(f"no pause or window {ascii(pause_id)[:40]} is there")
    _note(fleet, "resumed", f"the pause {pause_id} was ended", {"pause": pause_id})
    audit(request, "resume", "resumed", pause=pause_id)
    return json_response({"id": pause_id, "removed": True})


def _by(request: web.Request, claimed: str) -> str:
    """The token's name, and in brackets the one that the caller gives itself."""
    name = request[ACTOR].name
    return f"{name} ({claimed})" if claimed else name


def _note(fleet: Fleet, kind: str, text: str, data: dict[str, object]) -> None:
    fleet.events.own.add(
        at=fleet.clock.wall(), kind=kind, device_id="", slug=Slug(""), text=text, data=data
    )
