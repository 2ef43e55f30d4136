"""Audit: one event and one log record per change through the API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from aiohttp import web

from nomad_watchdog.api.audit_limits import AT_ONCE, PER_S, REPORT_EVERY_S
from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.context import CONTEXT, Context
from nomad_watchdog.events.log import AUDIT
from nomad_watchdog.ids import DeviceId, Slug, slug_of

log = logging.getLogger(__name__)

MAX_NAMED: Final = 20
"""Devices that one audit event names."""


def audit(
    request: web.Request,
    verb: str,
    outcome: str,
    device_id: DeviceId | None = None,
    *,
    devices: Sequence[str] = (),
    **facts: object,
) -> None:
    """Record a change that is stored. Call it only if something changed. `devices`: the changed devices of a bulk
    request; the first MAX_NAMED are listed."""
    actor = request[ACTOR]
    context = request.app[CONTEXT]
    fleet = context.fleet
    who: dict[str, object] = {
        "actor": actor.name,
        "role": actor.role.value if actor.role is not None else "signed",
        "peer": actor.peer,
        "outcome": outcome,
    }
    text = f"{outcome} by {actor.name} from {actor.peer}"
    if devices:
        more = len(devices) - MAX_NAMED
        facts |= {"devices": list(devices[:MAX_NAMED]), "others": max(0, more)}
        named = ", ".join(devices[:MAX_NAMED])
        text += f": {named}" + (f" and {more} more" if more > 0 else "")
    if actor.certificate:
        who["certificate"] = actor.certificate
    if context.audits.admits(actor.name, fleet.clock.monotonic()):
        fleet.events.own.add(
            at=fleet.clock.wall(),
            kind=f"{AUDIT}{verb}",
            device_id=device_id or "",
            slug=slug_of(device_id) if device_id is not None else Slug(""),
            text=text,
            data=who | facts,
        )
    else:
        context.metrics.audit_left_out()
        if context.audits.left_out[actor.name] == 1:
            later = asyncio.get_running_loop().call_later
            later(REPORT_EVERY_S, _report_left_out, context, actor.name)
    # "token:NAME" would be redacted, as if NAME were the value of a token.
    logged = who | facts | {"actor": actor.name.replace("token:", "token ", 1)}
    log.info("changed through the API", extra={"verb": verb, "device": device_id or "", **logged})


def _report_left_out(context: Context, actor: str) -> None:
    """Record one event about the changes of a token that have no event of their own."""
    count = context.audits.left_out.pop(actor, 0)
    context.fleet.events.note_fleet(
        f"{AUDIT}left_out",
        f"{count} changes by {actor} have no event: a maximum of {AT_ONCE} at once and {PER_S:g} per "
        "second are stored per token; the log has them all",
        {"actor": actor, "count": count},
    )
