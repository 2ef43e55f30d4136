"""Who changed what: one event and one line in the log for each change that came through the API."""

from __future__ import annotations

import logging

from aiohttp import web

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.door import ACTOR
from nomad_watchdog.ids import DeviceId, Slug, slug_of

log = logging.getLogger(__name__)


def audit(
    request: web.Request,
    verb: str,
    outcome: str,
    device_id: DeviceId | None = None,
    **facts: object,
) -> None:
    """Note a change that is done, and durable. What changed nothing is no change."""
    actor = request[ACTOR]
    fleet = request.app[CONTEXT].fleet
    who: dict[str, object] = {
        "actor": actor.name,
        "role": actor.role.value if actor.role is not None else "signed",
        "peer": actor.peer,
        "outcome": outcome,
    }
    if actor.certificate:
        who["certificate"] = actor.certificate
    fleet.history.add(
        at=fleet.clock.wall(),
        kind=f"audit.{verb}",
        device_id=device_id or "",
        slug=slug_of(device_id) if device_id is not None else Slug(""),
        text=f"{outcome} by {actor.name} from {actor.peer}",
        data=who | facts,
    )
    # "token:NAME" would be taken for a token and its value, and be hidden.
    told = who | facts | {"actor": actor.name.replace("token:", "token ", 1)}
    log.info("changed through the API", extra={"verb": verb, "device": device_id or "", **told})
