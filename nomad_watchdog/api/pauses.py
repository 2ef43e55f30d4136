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
from nomad_watchdog.model import WallTime
from nomad_watchdog.units import parse_duration

MAX_AHEAD_S: Final = 366 * 86400.0


def _pause_json(fleet: Fleet, pause: Pause) -> dict[str, object]:
    now = fleet.clock.wall()
    covered = sum(pause.target.matches(record.device) for record in fleet.records.values())
    return pause_json(pause) | {"active": pause.is_active(now), "covers": covered}


async def list_pauses(request: web.Request) -> web.StreamResponse:
    """Current and future pauses, in the order of their creation."""
    fleet = request.app[CONTEXT].fleet
    await fleet.presence.pauses.refresh()
    now = fleet.clock.wall()
    items = [
        _pause_json(fleet, pause) for pause in fleet.presence.pauses.all if not pause.is_over(now)
    ]
    return json_response({"items": items})


async def add_pause(request: web.Request) -> web.StreamResponse:
    """Stored before the response. Pausing the same target again changes the end of its pause.

    Raises NotFoundError (404) for devices that were never registered, UserError (400) for a class that is
    not configured and that no device has."""
    body = await read(request, PauseIn)
    fleet = request.app[CONTEXT].fleet
    begins, ends = _period(body, fleet.clock.wall())
    await check_devices(fleet, body.devices)
    if body.agent_class:
        check_class_name(fleet, body.agent_class)
    pause = Pause(
        id=new_id(),
        target=body.target(),
        begins=begins,
        ends=ends,
        reason=body.reason,
        by=_by(request, body.by),
        window=body.window,
    )
    stored = await fleet.presence.pauses.add(pause)
    what = "maintenance" if stored.window else "pause"
    by = f" by {stored.by}" if stored.by else ""
    text = f"{what} {stored.id}{by}: {stored.reason or 'no reason given'}"
    fleet.events.note_fleet("paused", text, {"pause": stored.id})
    audit(request, "pause", "paused", pause=stored.id)
    return json_response(_pause_json(fleet, stored), status=201)


def _period(body: PauseIn, now: WallTime) -> tuple[WallTime, WallTime | None]:
    """Begin and end of a pause; an end of None = until it is resumed. Raises UserError."""
    begins = now if body.begins is None else body.begins.timestamp()
    ends = body.until.timestamp() if body.until is not None else None
    if body.lasts is not None:
        ends = begins + parse_duration(body.lasts)
    what = "maintenance window" if body.window else "pause"
    if ends is not None and ends <= max(begins, now):
        raise UserError(f"the {what} would end before it begins; choose a later end")
    if max(begins, ends or 0.0) > now + MAX_AHEAD_S:
        raise UserError(f"a {what} may begin and end at most 366 days from now")
    return WallTime(begins), None if ends is None else WallTime(ends)


async def resume_targets(request: web.Request) -> web.StreamResponse:
    """End the pauses of exactly this target; devices are removed from the pauses that list them.

    Raises NotFoundError (404) if there is no such pause; the message lists the others."""
    body = await read(request, TargetIn)
    fleet = request.app[CONTEXT].fleet
    if not await fleet.presence.pauses.resume(body.target()):
        others = ", ".join(pause.id for pause in fleet.presence.pauses.in_force())
        raise NotFoundError(
            "no pause of exactly this target is in force"
            + (
                f"; others are in force: {others} (end them by their own target or ID)"
                if others
                else ""
            )
        )
    fleet.events.note_fleet(
        "resumed", "a pause was ended", body.model_dump(mode="json", by_alias=True)
    )
    audit(request, "resume", "resumed")
    return json_response({"resumed": True})


async def remove_pause(request: web.Request) -> web.StreamResponse:
    """End a pause or window by its ID."""
    pause_id = request.match_info["id"]
    fleet = request.app[CONTEXT].fleet
    if not await fleet.presence.pauses.remove(pause_id):
        raise NotFoundError(f"there is no pause or window {ascii(pause_id)[:40]}")
    fleet.events.note_fleet("resumed", f"the pause {pause_id} was ended", {"pause": pause_id})
    audit(request, "resume", "resumed", pause=pause_id)
    return json_response({"id": pause_id, "removed": True})


def _by(request: web.Request, claimed: str) -> str:
    """The name of the token, and in brackets the name that the caller sent."""
    name = request[ACTOR].name
    return f"{name} ({claimed})" if claimed else name
