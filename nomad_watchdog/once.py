"""One look and one plan carried out, for commands that don't stay: no loop, no lease, no second read."""

from __future__ import annotations

from collections import Counter

from nomad_watchdog.core.planner import NO_STOPS
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.performer import BATCH
from nomad_watchdog.reconciler import Reconciler
from nomad_watchdog.shown import shown_plan


async def look(reconciler: Reconciler) -> None:
    """Read the registry and the scheduler once, in full. Raises as `Registry.read` and
    `Scheduler.snapshot`, and ConflictError when a migration was begun or changed meanwhile."""
    fleet = reconciler.fleet
    await reconciler.follower.read()
    # Who looks once knows nothing of when a device left: waiting is for those who stay.
    fleet.attendance.leaving.clear()
    await reconciler.informer.read()
    fleet.refresh_all()
    # Reading may take longer than what moves there are is known for.
    if await reconciler.migrations.refresh():
        raise ConflictError("a migration has changed meanwhile; try again")


async def apply(
    reconciler: Reconciler, registry_index: int | None, *, allow_stops: bool
) -> dict[str, object]:
    """Carry out one plan, after `look`. `allow_stops`: an operator means the held ones too.

    Raises ConflictError when the registry is no longer at registry_index.
    """
    fleet, performer = reconciler.fleet, reconciler.performer
    if registry_index is not None and registry_index != fleet.index:
        raise ConflictError(
            f"the registry has moved from {registry_index} to {fleet.index} since the plan "
            "was made; make a new plan"
        )
    plan = reconciler.planning.make(NO_STOPS)
    if allow_stops and plan.held:
        plan = reconciler.planning.make(plan.held)
    outcomes: Counter[str] = Counter()
    performer.done = lambda _action, outcome, _took_s: outcomes.update([outcome])
    for first in range(0, len(plan.actions), BATCH):
        await performer.perform(plan.actions[first : first + BATCH])
    return {**shown_plan(plan, fleet.index, fleet.placements), "outcomes": dict(outcomes)}
