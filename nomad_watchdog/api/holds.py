"""Confirmation of changes that are on hold (S7): stops of agents, and departures of devices."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import ConfirmIn
from nomad_watchdog.controllers.expiry import ExpiryController
from nomad_watchdog.controllers.held_changes import report_confirmation
from nomad_watchdog.core.holds import DEPARTURES, STOPS, HoldKind
from nomad_watchdog.errors import ConflictError, NotFoundError


async def confirm_stops(request: web.Request) -> web.StreamResponse:
    """Confirm the held stops that `id` names.

    Raises ConflictError (409) when nothing is held, or other stops than `id` names."""
    named = (await read(request, ConfirmIn)).id
    operator = request.app[CONTEXT].operator
    if operator is not None:
        operator.hold_now()
    held_id = operator.breaker.held_id if operator is not None else ""
    confirm = operator.confirm_stops if operator is not None else int
    count = _confirmed(request, STOPS, named, held_id, confirm)
    audit(request, "confirm", "confirmed", held_id=named, stops=count)
    return json_response({"confirmed": count, "id": named}, status=202)


async def departures(request: web.Request) -> web.StreamResponse:
    """The departures that are on hold."""
    return json_response(_controller(request).held_json())


async def confirm_departures(request: web.Request) -> web.StreamResponse:
    """Confirm the held departures that `id` names.

    Raises ConflictError (409) when nothing is held, or other departures than `id` names."""
    named = (await read(request, ConfirmIn)).id
    found = _controller(request)
    count = _confirmed(request, DEPARTURES, named, found.held_id, found.confirm)
    audit(request, "confirm-departures", "confirmed", held_id=named, count=count)
    return json_response({"confirmed": count, "id": named}, status=202)


def _controller(request: web.Request) -> ExpiryController:
    found = request.app[CONTEXT].departures
    if found is None:
        raise NotFoundError("this control plane does not let devices leave")
    return found


def _confirmed(
    request: web.Request, kind: HoldKind, named: str, held_id: str, confirm: Callable[[], int]
) -> int:
    """How many changes were confirmed."""
    if not held_id:
        raise ConflictError(f"no {kind.name} are held; there is nothing to confirm")
    if named != held_id:
        raise ConflictError(
            f"other {kind.name} are held now, with the ID {held_id}; check them before you confirm"
        )
    count = confirm()
    report_confirmation(request.app[CONTEXT].fleet, kind, held_id, count)
    return count
