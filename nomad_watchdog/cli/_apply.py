"""``apply`` while the service runs: the service reloads its configuration and does the work; the command waits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from nomad_watchdog.cli._answers import LeasesAnswer, PlanAnswer
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
"""Maximum time for which stops may be on hold before the command gives up. A second read takes some seconds."""
FOLLOW_S: Final = 15.0
"""Maximum time until all replicas apply the class specs that one of them has brought into force."""
SLACK_S: Final = 60.0
"""Maximum time without progress, in addition to the start-up grace, the soak time and the kill timeout."""


def apply_by_service(
    api: ApiClient,
    settings: Settings,
    running: Sequence[Replica],
    planned: PlanAnswer,
    *,
    stops: int,
) -> PlanAnswer:
    """Make the replicas reload their configuration, and wait until `planned` is done. `stops`: the number of held
    stops to approve.

    The result has the classes that a replica could not prepare. Raises UserError when a replica's own file
    is not valid, ConflictError when it differs from ours or the number of held stops is not `stops`,
    TransientError when there is no progress."""
    clients = _clients(api, running)
    for one in clients:
        try:
            one.post("/v1/config:reload", None)
        except NotFoundError as error:
            raise ConflictError(
                f"the service at {one.address} can't reload its configuration: it has an older "
                "version; restart it"
            ) from error
    plans = _agreed_plans(clients, settings)
    if stops:
        _confirm(clients, plans, stops)
    limits = settings.limits()
    kill_s = max((kind.kill_timeout for kind in settings.agent_class.values()), default=0.0)
    timeout_s = limits.startup_grace_s + limits.soak_s + kill_s + SLACK_S
    plans = _wait(clients, planned, timeout_s)
    done = len(planned["actions"]) + planned["waiting_rollout"] + stops
    return {
        **planned,
        "unprepared_classes": {
            name: why for plan in plans for name, why in plan.get("unprepared_classes", {}).items()
        },
        "outcomes": {"ok": done},
    }


def _clients(api: ApiClient, running: Sequence[Replica]) -> list[ApiClient]:
    """One client per replica. The address that a single replica advertises need not be reachable from here."""
    try:
        replicas = api.get("/v1/leases", LeasesAnswer)["replicas"]
    except DeniedError:
        raise
    except TerminalError as error:
        where = running[0]
        raise TransientError(
            f"the control plane {where.id} is running ({where.api}), but its API does not answer here, so "
            f"it can't be made to reload its configuration: {error}"
        ) from error
    found = sorted({one["api"] for one in replicas if one["api"]})
    return [api.at(address) for address in found] if len(found) > 1 else [api]


def _agreed_plans(clients: Sequence[ApiClient], settings: Settings) -> list[PlanAnswer]:
    """The replicas' plans once all apply the class specs of these settings. A replica that has reloaded may take
    some seconds to follow the next one. Raises ConflictError when one does not."""
    until = time.monotonic() + FOLLOW_S
    while True:
        plans = _plans(clients)
        try:
            for one, plan in zip(clients, plans, strict=True):
                _compare(one, plan, settings)
        except ConflictError:
            if len(clients) == 1 or time.monotonic() > until:
                raise
            time.sleep(POLL_S)  # noqa: TID251  # a command, with a deadline
        else:
            return plans


def _plans(clients: Sequence[ApiClient]) -> list[PlanAnswer]:
    return [one.get("/v1/plan", PlanAnswer) for one in clients]


def _compare(one: ApiClient, plan: PlanAnswer, settings: Settings) -> None:
    wanted = {name: spec.spec_hash for name, spec in settings.readable_specs()[0].items()}
    theirs = plan.get("specs", {})
    names = sorted(name for name in {*wanted, *theirs} if wanted.get(name) != theirs.get(name))
    if not names:
        return
    raise ConflictError(
        f"the service at {one.address} has another configuration of class {', '.join(names)} than this "
        "command: give it the same file and try again"
    )


def _confirm(clients: Sequence[ApiClient], plans: Sequence[PlanAnswer], stops: int) -> None:
    held = sum(plan["held"]["count"] for plan in plans)
    if held != stops:
        raise ConflictError(f"--allow-stops {stops}: the service has {held} stops on hold now")
    for one, plan in zip(clients, plans, strict=True):
        if plan["held"]["count"]:
            one.post("/v1/plan:confirm", {"id": plan["held"]["id"]})


def _wait(clients: Sequence[ApiClient], planned: PlanAnswer, timeout_s: float) -> list[PlanAnswer]:
    """Wait until the replicas have nothing left to do, and no more devices lack an agent than before; their
    plans then."""
    total = len(planned["actions"]) + planned["waiting_rollout"]
    lacking = planned.get("unplaced", 0)
    before, since = None, time.monotonic()
    while True:
        plans = _plans(clients)
        actions = sum(len(plan["actions"]) for plan in plans)
        waiting = sum(plan["waiting_rollout"] for plan in plans)
        unplaced = sum(plan.get("unplaced", 0) for plan in plans)
        preparing = any(plan.get("preparing") for plan in plans)
        if not preparing and not actions and not waiting and unplaced <= lacking:
            return plans
        # A roll-out of agents that do not run is a mass change too; the service's second read confirms it.
        held = next((plan["held"] for plan in plans if plan["held"]["count"]), None)
        if held and time.monotonic() - since > HELD_S:
            raise TransientError(f"stops are on hold: {held['reason']}")
        now = (actions, waiting, unplaced)
        under_way = min(max(actions, unplaced - lacking), max(0, total - waiting))
        text = progress(max(0, total - waiting - under_way), under_way, waiting)
        if now != before:
            before, since = now, time.monotonic()
            click.echo(text, err=True)
        elif time.monotonic() - since > timeout_s:
            raise TransientError(
                f"no progress for {timeout_s:.0f} s: {text}; the service continues, and "
                "`nomad-watchdog status` shows its progress"
            )
        time.sleep(POLL_S)  # noqa: TID251  # a command, with a deadline
