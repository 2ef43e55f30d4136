"""``apply`` while the service runs: it reads its configuration again and does the work, and is watched."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from nomad_watchdog.cli._api_client import ApiClient
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    TerminalError,
    TransientError,
)
from nomad_watchdog.units import progress

if TYPE_CHECKING:
    from nomad_watchdog.config.settings import Settings
    from nomad_watchdog.replicas.leases import Replica

POLL_S: Final = 0.5
HELD_S: Final = 20.0
"""So long stops may be held before an operator must look: a second read takes some seconds."""
FOLLOW_S: Final = 15.0
"""So long replicas may take to go by what one of them has brought into force."""
SLACK_S: Final = 60.0
"""Over the grace of a start, its soak and a stop: how long nothing may move."""


def apply_by_service(
    api: ApiClient,
    settings: Settings,
    running: Sequence[Replica],
    shown: dict[str, Any],
    *,
    stops: int,
) -> dict[str, Any]:
    """Have the replicas go by these settings, and wait until what `shown` plans is done.

    The result names the classes that a replica could not prepare. Raises UserError when a replica's own file
    is not valid, ConflictError when it says something else than ours or other stops are held than `stops`,
    TransientError when nothing moves."""
    clients = _clients(api, running)
    for one in clients:
        try:
            one.post("/v1/config:reload", None)
        except NotFoundError as error:
            raise ConflictError(
                f"the service at {one.address} can't read its configuration again: it is of an older "
                "version; restart it"
            ) from error
    views = _agreed(clients, settings)
    if stops:
        _confirm(clients, views, stops)
    limits = settings.limits()
    kill_s = max((kind.kill_timeout for kind in settings.agent_class.values()), default=0.0)
    views = _wait(clients, shown, limits.startup_grace_s + limits.soak_s + kill_s + SLACK_S)
    refused = {name: why for view in views for name, why in view["unprepared_classes"].items()}
    shown = {**shown, "unprepared_classes": refused}
    return {**shown, "outcomes": {"ok": len(shown["actions"]) + shown["waiting_rollout"] + stops}}


def _clients(api: ApiClient, running: Sequence[Replica]) -> list[ApiClient]:
    """One client per replica. What a single one is called by others need not be reachable from here."""
    try:
        replicas = api.get("/v1/leases")["replicas"]
    except DeniedError:
        raise
    except TerminalError as error:
        where = running[0]
        raise TransientError(
            f"the control plane {where.id} is running ({where.api}), and its API does not answer here, so "
            f"that it can't be told of the configuration: {error}"
        ) from error
    found = sorted({one["api"] for one in replicas if one["api"]})
    return [api.at(address) for address in found] if len(found) > 1 else [api]


def _agreed(clients: Sequence[ApiClient], settings: Settings) -> list[dict[str, Any]]:
    """The replicas' plans once all go by these settings. One that has reloaded follows what the next one brings into
    force some seconds later. Raises ConflictError when one does not."""
    until = time.monotonic() + FOLLOW_S
    while True:
        views = [one.get("/v1/plan") for one in clients]
        try:
            for one, view in zip(clients, views, strict=True):
                _compare(one, view, settings)
        except ConflictError:
            if len(clients) == 1 or time.monotonic() > until:
                raise
            time.sleep(POLL_S)  # noqa: TID251  # a verb, with a deadline
        else:
            return views


def _compare(one: ApiClient, view: dict[str, Any], settings: Settings) -> None:
    wanted = {name: spec.spec_hash for name, spec in settings.readable_specs()[0].items()}
    theirs = view.get("specs")
    if theirs == wanted:
        return
    known = theirs if isinstance(theirs, dict) else {}
    names = sorted(name for name in {*wanted, *known} if wanted.get(name) != known.get(name))
    raise ConflictError(
        f"the service at {one.address} has another configuration of class {', '.join(names)} than this "
        "one: give it the same file and try again"
    )


def _confirm(clients: Sequence[ApiClient], views: Sequence[dict[str, Any]], stops: int) -> None:
    held = sum(view["held"]["count"] for view in views)
    if held != stops:
        raise ConflictError(f"--allow-stops {stops}: the service holds {held} stops now")
    for one, view in zip(clients, views, strict=True):
        if view["held"]["count"]:
            one.post("/v1/plan:confirm", {"id": view["held"]["id"]})


def _wait(
    clients: Sequence[ApiClient], shown: dict[str, Any], patience_s: float
) -> list[dict[str, Any]]:
    """Until the replicas have nothing left to do, and no more devices lack an agent than before; their plans
    then."""
    lacking, planned = shown.get("unplaced", 0), len(shown["actions"]) + shown["waiting_rollout"]
    before, since = None, time.monotonic()
    while True:
        views = [one.get("/v1/plan") for one in clients]
        actions = sum(len(view["actions"]) for view in views)
        waiting = sum(view["waiting_rollout"] for view in views)
        unplaced = sum(view["unplaced"] for view in views)
        preparing = any(view["preparing"] for view in views)
        if not preparing and not actions and not waiting and unplaced <= lacking:
            return views
        # A roll-out of agents that do not run is a mass change too; the service's second read lets it go.
        held = next((view["held"] for view in views if view["held"]["count"]), None)
        if held and time.monotonic() - since > HELD_S:
            raise TransientError(f"stops are held: {held['reason']}")
        now = (actions, waiting, unplaced)
        under_way = min(max(actions, unplaced - lacking), max(0, planned - waiting))
        told = progress(max(0, planned - waiting - under_way), under_way, waiting)
        if now != before:
            before, since = now, time.monotonic()
            click.echo(told, err=True)
        elif time.monotonic() - since > patience_s:
            raise TransientError(
                f"no progress for {patience_s:.0f} s: {told}; the service goes on with it, and "
                "`nomad-watchdog status` shows how far it is"
            )
        time.sleep(POLL_S)  # noqa: TID251  # a verb, with a deadline
