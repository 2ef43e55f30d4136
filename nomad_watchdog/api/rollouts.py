"""Roll-outs of the versions of agent classes."""

from __future__ import annotations

from typing import Annotated, Final

from aiohttp import web
from pydantic import AfterValidator, Field

from nomad_watchdog.api.answers import AnyOut
from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.routing import Handler, Route
from nomad_watchdog.controllers.rollout_requests import RolloutRequests
from nomad_watchdog.device_fields import Strict, printable
from nomad_watchdog.errors import NotFoundError


class RolloutIn(Strict):
    """A request to a roll-out."""

    by: Annotated[str, Field(max_length=64), AfterValidator(printable)] = ""


def _rollouts(request: web.Request) -> RolloutRequests:
    found = request.app[CONTEXT].rollouts
    if found is None:
        raise NotFoundError("this server has no controller for roll-outs")
    return found


async def list_rollouts(request: web.Request) -> web.StreamResponse:
    """The roll-out of each class."""
    return json_response(await _rollouts(request).view())


async def one_rollout(request: web.Request) -> web.StreamResponse:
    """The roll-out of one class."""
    return json_response(_rollouts(request).item(request.match_info["id"]))


async def history(request: web.Request) -> web.StreamResponse:
    """Roll-outs of a class that are over."""
    return json_response(_rollouts(request).history(request.match_info["id"]))


def _control(what: str) -> Handler:
    """The handler of a request to the roll-out of a class."""

    async def control(request: web.Request) -> web.StreamResponse:
        body = await read(request, RolloutIn)
        actor, name = request[ACTOR].name, request.match_info["id"]
        by = f"{actor} ({body.by})" if body.by else actor
        found = await _rollouts(request).control(name, what, by)
        audit(request, "rollout", what, agent_class=name, version=str(found["version"]))
        return json_response(found)

    control.__name__ = f"{what}_rollout".replace("-", "_")
    return control


_CHANGES: Final = {
    "promote": "End the pause or soak of the current step",
    "promote-all": "Roll out the rest without pauses and soaks",
    "pause": "Replace no more agents; those in progress finish",
    "resume": "Resume a paused roll-out",
    "abort": "Give the version up, and go back to the proven one",
    "retry": "Continue with a version that was given up, at its step",
    "undo": "Go back to the version before, also after the roll-out is complete",
}
ROUTES: Final = (
    Route("GET", "/v1/rollouts", list_rollouts, "Roll-outs by agent class", {200: AnyOut}),
    Route("GET", "/v1/rollouts/{id}", one_rollout, "The roll-out of a class", {200: AnyOut}),
    Route("GET", "/v1/rollouts/{id}/history", history, "Roll-outs that are over", {200: AnyOut}),
    *(
        Route(
            "POST",
            f"/v1/rollouts/{{id}}/{what}",
            _control(what),
            summary,
            {200: AnyOut, 404: "no such class", 409: "not possible in its current state"},
            body=RolloutIn,
        )
        for what, summary in _CHANGES.items()
    ),
)
