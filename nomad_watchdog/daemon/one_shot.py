"""Plans and applies without the running service: read, act, and read again until the plan is done.

There is no control loop, no lease and no report of an agent. An agent is ready if its scheduler reports that it runs.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers import inventory_file
from nomad_watchdog.controllers.agents.executor import BATCH
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.inventory import source_of
from nomad_watchdog.core import inventory_diff
from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.core.planner import NO_STOPS, Plan, Stop
from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.daemon.factory import open_leases, open_registry, open_scheduler, replicas
from nomad_watchdog.errors import ConflictError, TransientError, UserError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Device, DeviceRecord, Presence
from nomad_watchdog.registry import Registry, backup
from nomad_watchdog.replicas.leases import SoleOwner
from nomad_watchdog.schedulers import Scheduler
from nomad_watchdog.units import progress

POLL_S: Final = 0.5
MAX_FAILURES: Final = 3
"""Failed actions of one device after which no more are tried."""


async def read_all(reconciler: Reconciler, *, bring: bool = False) -> None:
    """Read the registry, the scheduler, and the class specs in force once, in full. `bring`: bring our own class specs
    into force, as a control plane does that starts. Raises as `Registry.read` and `Scheduler.snapshot`, and
    ConflictError when a migration was started or changed meanwhile."""
    fleet = reconciler.fleet
    await reconciler.follower.read()
    # A one-shot plan does not know when a device left, so it does not apply the grace period.
    fleet.presence.heartbeats.leaving.clear()
    await reconciler.informer.read()
    await reconciler.classes.read_once(bring=bring)
    fleet.verdicts.judge_all()
    # The list of migrations may have become old while the scheduler was read.
    if await reconciler.migrations.refresh():
        raise ConflictError("a migration has changed meanwhile; try again")


@dataclass(slots=True)
class _Progress:
    """The actions that have been done so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: Counter[Slug] = field(default_factory=Counter)
    replaced: set[Slug] = field(default_factory=set)
    """Devices whose agent is being replaced."""

    def count(self, action: Action, outcome: str, _took_s: float) -> None:
        # A replacement is one action of the plan, but a stop and a start.
        if not (
            outcome == "ok" and action.kind is ActionKind.START and action.slug in self.replaced
        ):
            self.outcomes[outcome] += 1
        if outcome == "failed":
            self.failures[action.slug] += 1

    def is_given_up(self, slug: Slug) -> bool:
        return self.failures[slug] >= MAX_FAILURES


async def apply(
    reconciler: Reconciler,
    registry_index: int | None,
    *,
    allow_stops: bool,
    report_progress: Callable[[str], None] = lambda _text: None,
) -> dict[str, object]:
    """Apply one plan, after `read_all`, with all windows of the roll-outs in it. `allow_stops`: held stops are
    approved. `report_progress` gets the progress of a roll-out as text.

    Raises ConflictError if the registry has changed since registry_index, TransientError if a roll-out makes no
    progress, stops are on hold, or devices failed MAX_FAILURES times.
    """
    fleet = reconciler.fleet
    if registry_index is not None and registry_index != fleet.records.index:
        raise ConflictError(
            f"the registry has moved from {registry_index} to {fleet.records.index} since the plan "
            "was made; make a new plan"
        )
    plan = reconciler.plan_builder.make(NO_STOPS)
    confirmed = plan.held if allow_stops else NO_STOPS
    plan = reconciler.plan_builder.make(confirmed) if confirmed else plan
    planned = reconciler.plan_builder.shown(plan)
    done = _Progress()
    reconciler.act_once()
    reconciler.executor.ended.connect(done.count)
    await _perform(reconciler, plan, done)
    if plan.waiting or done.replaced:
        await _follow(reconciler, confirmed, done, report_progress)
    failed = [slug for slug in done.failures if done.is_given_up(slug)]
    if failed:
        why = reconciler.executor.obstacles.get(failed[0], "")
        name = fleet.records[failed[0]].device.id if failed[0] in fleet.records else failed[0]
        raise TransientError(f"{len(failed)} devices failed {MAX_FAILURES} times; {name!a}: {why}")
    return {**planned, "outcomes": dict(done.outcomes)}


async def _perform(reconciler: Reconciler, plan: Plan, done: _Progress) -> None:
    executor, freshness = reconciler.executor, reconciler.informer.freshness
    actions = [
        action
        for action in plan.actions
        if action.slug not in executor.expectations
        and not freshness.premature(action)
        and not done.is_given_up(action.slug)
    ]
    present = reconciler.fleet.records
    done.replaced |= {
        action.slug
        for action in actions
        if action.kind is ActionKind.REPLACE
        or (
            action.kind is ActionKind.RETIRE
            and action.slug in present
            and present[action.slug].presence is Presence.PRESENT
        )
    }
    for first in range(0, len(actions), BATCH):
        await executor.perform(actions[first : first + BATCH])


async def _follow(
    reconciler: Reconciler,
    confirmed: frozenset[Stop],
    done: _Progress,
    report_progress: Callable[[str], None],
) -> None:
    """Read and act until every replaced device has its new agent, and none waits any more."""
    fleet, limits = reconciler.fleet, reconciler.fleet.limits
    timeout_s = limits.startup_grace_s + limits.soak_s + _kill_timeout_s(reconciler)
    before: object = None
    held = NO_STOPS
    since = fleet.clock.monotonic()
    while True:
        await asyncio.sleep(POLL_S)
        await read_all(reconciler)
        plan, confirmed = _plan_again(reconciler, confirmed, held)
        held = plan.held
        await _perform(reconciler, plan, done)
        open_ = [s for s in done.replaced if not done.is_given_up(s) and not _is_done(fleet, s)]
        todo = [a for a in plan.actions if not done.is_given_up(a.slug)]
        if not open_ and not todo and not plan.waiting:
            return
        now = (len(plan.waiting), len(open_), len(done.replaced))
        if now != before:
            before, since = now, fleet.clock.monotonic()
            report_progress(
                progress(len(done.replaced) - len(open_), len(open_), len(plan.waiting))
            )
        elif fleet.clock.monotonic() - since > timeout_s:
            raise TransientError(
                f"no progress for {timeout_s:.0f} s: {len(done.replaced) - len(open_)} replaced, "
                f"{len(plan.waiting)} waiting; in progress: {_names(fleet, open_)}"
            )


def _plan_again(
    reconciler: Reconciler, confirmed: frozenset[Stop], held: frozenset[Stop]
) -> tuple[Plan, frozenset[Stop]]:
    """A new plan, and the stops that are confirmed now. `held`: the stops that the plan before it put on hold.

    Raises TransientError if the same stops stay on hold."""
    plan = reconciler.plan_builder.make(confirmed)
    if not plan.held:
        return plan, confirmed
    # Two reads that agree confirm stops, as in the service (S7), except of devices without a record.
    records = reconciler.fleet.records
    confirmed |= {stop for stop in plan.held & held if stop[0] in records}
    if held != plan.held:
        return plan, confirmed
    plan = reconciler.plan_builder.make(confirmed)
    if plan.held and held == plan.held:
        raise TransientError(f"stops are on hold: {plan.hold_reason}")
    return plan, confirmed


def _is_done(fleet: Fleet, slug: Slug) -> bool:
    record = fleet.records.get(slug)
    return (
        record is None or record.presence is Presence.ABSENT or fleet.agents.has_ready_agent(slug)
    )


def _kill_timeout_s(reconciler: Reconciler) -> float:
    return max((spec.kill_timeout_s for spec in reconciler.classes.specs.values()), default=0.0)


def _names(fleet: Fleet, slugs: Iterable[Slug]) -> str:
    """The first devices, each with the scheduler's reason why it has no agent."""
    parts = []
    for slug in sorted(slugs)[:3]:
        reasons = [one.reason for one in fleet.placements.get(slug, ()) if one.reason]
        record = fleet.records.get(slug)
        name = ascii(record.device.id if record is not None else slug)
        parts.append(f"{name}: {reasons[-1]}" if reasons else name)
    return "; ".join(parts) or "none"


COMMAND: Final = "apply"
"""The name of a command where it acts as a replica."""


async def initialise(settings: Settings) -> str:
    """Write the registry's sentinel unless it exists; the ID of the installation."""
    async with open_registry(settings) as registry:
        return await registry.initialise()


async def export_registry(settings: Settings) -> list[str]:
    """The registry as lines, for `import_registry`."""
    async with open_registry(settings) as registry:
        return await backup.lines(registry)


async def import_registry(
    settings: Settings,
    installation: str,
    records: Sequence[DeviceRecord],
    floor: EpochFloor,
    *,
    dry_run: bool,
) -> backup.Restored:
    """See `backup.restore`."""
    async with open_registry(settings) as registry:
        return await backup.restore(registry, installation, records, floor, dry_run=dry_run)


def _listed(settings: Settings) -> dict[str, dict[Slug, Device]]:
    """Path → the devices of each inventory file. Raises UserError with all errors."""
    found, wrong = {}, []
    for path in settings.inventory:
        try:
            signature = inventory_file.signature(path)
            found[path] = inventory_file.read(path, signature, settings.agent_class)
        except UserError as error:
            wrong.append(f"inventory {error}")
    if wrong:
        raise UserError("\n".join(wrong))
    return found


def _unregistered(listed: dict[str, dict[Slug, Device]], fleet: Fleet) -> list[dict[str, object]]:
    """Inventory files whose devices differ from the registry. Only the running service registers them."""
    sources = frozenset(map(source_of, listed))
    found = []
    for path, devices in listed.items():
        changes = inventory_diff.compare(devices, fleet.records, source_of(path), sources)
        new, gone = len(changes.register), len(changes.depart)
        if new or gone:
            found.append(
                {
                    "file": path,
                    "to_register": new,
                    "to_remove": gone,
                    "text": f"inventory {path}: {new} devices to register and {gone} to remove, not counted here; "
                    "`nomad-watchdog run` does it",
                }
            )
    return found


async def plan_once(settings: Settings) -> dict[str, object]:
    """The plan of a pass, from one read of registry and scheduler. Changes nothing. Raises UserError for an
    inventory file that can't be used."""
    listed = await asyncio.to_thread(_listed, settings)
    async with open_registry(settings) as registry:
        installation = await registry.installation()
        async with open_scheduler(settings, installation) as scheduler:
            reconciler = await _read_once(settings, registry, scheduler)
            return reconciler.plan_builder.view() | {
                "inventory": _unregistered(listed, reconciler.fleet)
            }


async def apply_once(
    settings: Settings,
    *,
    registry_index: int | None = None,
    allow_stops: bool = False,
    report_progress: Callable[[str], None] = lambda _text: None,
) -> dict[str, object]:
    """Make a plan and apply it (see `apply`), while no service runs."""
    async with open_registry(settings) as registry:
        installation = await registry.installation()
        async with open_scheduler(settings, installation) as scheduler:
            reconciler = await _read_once(settings, registry, scheduler, bring=True)
            specs = dict(reconciler.classes.specs)
            reconciler.classes.prepared(specs, await scheduler.prepare(list(specs.values())))
            await reconciler.classes.history.remember(reconciler.classes.specs.values())
            return await apply(
                reconciler, registry_index, allow_stops=allow_stops, report_progress=report_progress
            )


async def _configs(settings: Settings) -> list[str]:
    """The digests of the configurations of the control planes that run now."""
    if settings.registry_kind == "sqlite":
        async with open_leases(settings, SystemClock()) as leases:
            return list(leases.configs() or ())
    return [one.config for one in await replicas(settings)]


async def _read_once(
    settings: Settings, registry: Registry, scheduler: Scheduler, *, bring: bool = False
) -> Reconciler:
    fleet = Fleet(registry, settings.limits(), SystemClock(), receives_reports=False)
    specs, unreadable = settings.readable_specs()
    reconciler = Reconciler(
        fleet,
        scheduler,
        specs,
        Metrics(),
        SoleOwner(replica=f"{COMMAND}-{secrets.token_hex(4)}", others=await _configs(settings)),
        unreadable=unreadable,
        place=settings.placer(),
        strategies=settings.strategies(),
    )
    await read_all(reconciler, bring=bring)
    return reconciler
