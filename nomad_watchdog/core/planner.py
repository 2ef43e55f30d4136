"""(desired, observed, limits) → Plan: the next actions for each device, and why.

A plan covers a whole shard, so that a mass change can be detected and put on hold (S7). It is carried out per device.
Rules, in the order in which they apply to a device:

1. A placement of an absent or unknown device is retired.
2. A placement without the registry's epoch is retired (S1). Nothing starts until it is dead: only the
   scheduler decides when no process is left (S3).
3. A live placement at the registry's epoch is kept, unless its spec is not the current one of its class;
   then it is replaced, as many at a time as `rollout.admit` allows.
   A placement on a scheduler that its device is to leave (`migration`), or that a controller asks to leave
   (`moves`), is replaced in the same way.
   A placement that makes no progress towards a running agent (`stuck_placements`) is replaced, at most
   `stalled_room` per pass.
   A placement that depends on a replica that is gone (`report_addresses.stranded`) is replaced at once.
4. Without a live placement, the agent is started. The epoch is used again only if no agent was ever seen
   at it (the answer to the first try was lost); otherwise the next number is taken (S2).

A device to which no rule applies costs one comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.core import holds, rollout
from nomad_watchdog.core.actions import Action, ActionKind, Move
from nomad_watchdog.core.goals import Changes, Goals
from nomad_watchdog.core.migration import BackendAssignment
from nomad_watchdog.core.report_addresses import stranded
from nomad_watchdog.core.rollout import ALL_READY, Readiness
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Epoch, Limits, Placement, PlacementState, Presence

Placements = Mapping[Slug, tuple[Placement, ...]]
Stop = tuple[Slug, Epoch, str]
"""Identifies a stop for the breaker: device, epoch and the scheduler's reference."""

NO_STOPS: Final[frozenset[Stop]] = frozenset()
NO_SLUGS: Final[frozenset[Slug]] = frozenset()
_RUNNING: Final = PlacementState.RUNNING
_DEAD: Final = PlacementState.DEAD
_PRESENT: Final = Presence.PRESENT


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions to take now. `held`: stops that the breaker puts on hold until a second read confirms them."""

    actions: tuple[Action, ...]
    held: frozenset[Stop] = NO_STOPS
    hold_reason: str = ""
    waiting: tuple[Action, ...] = ()
    """Replacements that wait for their turn in a roll-out or migration."""
    refused: tuple[Action, ...] = ()
    """Starts that the rules require and `is_safe` does not allow: a bug."""

    @property
    def waiting_rollout(self) -> int:
        """Number of replacements that wait for their turn."""
        return len(self.waiting)


def plan(  # noqa: PLR0913  # all that a decision stands on, by name
    records: Mapping[Slug, DeviceRecord],
    placements: Placements,
    goals: Goals,
    limits: Limits,
    *,
    readiness: Readiness = ALL_READY,
    confirmed: frozenset[Stop] = NO_STOPS,
    resting: AbstractSet[Slug] = NO_SLUGS,
    stalled_room: int = 0,
) -> Plan:
    """Decide on the actions for every device.

    `readiness`: see `rollout.admit`. `confirmed`: stops that an earlier pass put on hold and that these independently
    read inputs still require. `resting`: devices without any action now: paused, within the grace period after they
    left, or with an unreadable record, so that their desired state is unknown. `stalled_room`: maximum number of
    placements that are given up in this pass because they are stalled.
    """
    present, decided = _decided(records, placements, goals, resting)
    starts = [action for action in decided if action.kind is ActionKind.START]
    stops = [action for action in decided if action.kind is ActionKind.RETIRE]
    replacements = [action for action in decided if action.kind is ActionKind.REPLACE]
    stops.extend(_strays(records, placements, resting))
    admitted = _admitted(replacements, readiness, present, limits, stalled_room)
    stops, held, reason = _breaker(stops, placements, limits, confirmed)
    if held:
        admitted = ()
    refused = [a for a in starts if not is_safe(a, records[a.slug], placements.get(a.slug, ()))]
    starts = [a for a in starts if a not in refused] if refused else starts
    actions = sorted([*starts, *stops, *admitted], key=lambda a: (a.slug, a.kind, a.epoch))
    begun = {action.slug for action in admitted}
    return Plan(
        actions=tuple(actions),
        held=held,
        hold_reason=reason,
        waiting=tuple(action for action in replacements if action.slug not in begun),
        refused=tuple(refused),
    )


def _admitted(
    replacements: Sequence[Action],
    readiness: Readiness,
    present: int,
    limits: Limits,
    stalled_room: int,
) -> tuple[Action, ...]:
    """The replacements that begin in this pass."""
    at_once = [action for action in replacements if action.move is Move.STRANDED]
    others = [action for action in replacements if action.move is not Move.STRANDED]
    admitted = rollout.admit(
        [action for action in others if action.move is not Move.STALLED],
        readiness,
        fleet=present,
        limits=limits,
    )
    admitted += rollout.give_up(
        [action for action in others if action.move is Move.STALLED],
        readiness,
        room=rollout.window(present, limits) - len(admitted),
        most=stalled_room,
    )
    return (*at_once, *admitted)


def _decided(
    records: Mapping[Slug, DeviceRecord],
    placements: Placements,
    goals: Goals,
    resting: AbstractSet[Slug],
) -> tuple[int, list[Action]]:
    """The number of present devices, and the next actions of each device that needs any."""
    decided: list[Action] = []
    present = 0
    hashes, trials, homes = goals.spec_hashes, goals.trials, goals.homes
    silent, requested = goals.reach.silent, goals.requested
    for slug, record in records.items():
        found = placements.get(slug, ())
        if record.presence is _PRESENT:
            present += 1
            if len(found) == 1:
                only = found[0]
                if (
                    only.state is _RUNNING
                    and only.epoch == record.epoch
                    and only.spec_hash
                    == (trials.get(slug) or hashes.get(record.device.agent_class))
                    and homes.is_at_goal(only, record)
                    and slug not in silent
                    and slug not in requested
                ):
                    continue
        elif not found:
            continue
        if slug in resting:
            continue
        decided.extend(decide(record, found, goals))
    return present, decided


def is_safe(start: Action, record: DeviceRecord, found: tuple[Placement, ...]) -> bool:
    """Whether this start is safe, whatever rule requires it: the device is present, no agent of it can be alive (S3),
    and neither a placement nor the record has a later epoch (S2).

    Checked for each start at run time, independently of the rules, so that a bug in them starts nothing."""
    return (
        record.presence is _PRESENT
        and all(one.state is _DEAD and one.epoch <= start.epoch for one in found)
        and record.epoch <= start.epoch
    )


def decide(record: DeviceRecord, found: tuple[Placement, ...], goals: Goals) -> Iterator[Action]:
    """The next actions for one device (rules 1 to 4)."""
    live = [p for p in found if p.state is not _DEAD]
    if record.presence is not _PRESENT:
        for placement in live:
            yield from _retire(record, placement, "the device has left")
        return
    current = [p for p in live if p.epoch == record.epoch]
    for placement in live:
        if placement.epoch != record.epoch:
            older = "older" if placement.epoch < record.epoch else "newer"
            yield from _retire(
                record,
                placement,
                f"epoch {placement.epoch} is {older} than the registry's {record.epoch}",
            )
    if current:
        yield from _keep(record, current, goals)
    elif not live and record.device.agent_class in goals.spec_hashes:
        yield _start(record, found, goals.homes)


def _keep(record: DeviceRecord, current: list[Placement], goals: Goals) -> Iterator[Action]:
    # Two placements at one epoch should not exist. If a scheduler made them, all replicas, and the backend
    # that removes the others, must keep the same one: the oldest. Which one is accepted does not count,
    # because replicas may learn of it at different times. A stop can't be undone, so a stopping placement
    # is kept only if there is no other.
    current.sort(key=lambda p: (p.state is PlacementState.STOPPING, p.created_at, p.ref))
    for placement in current[1:]:
        yield from _retire(record, placement, "another placement has the same epoch")
    keeper = current[0]
    if goals.spec_hash(record) is None or keeper.state is PlacementState.STOPPING:
        return
    why = _why_replace(record, keeper, goals)
    if why is None:
        return
    move, reason = why
    request = goals.requested.get(record.slug)
    yield Action(
        kind=ActionKind.REPLACE,
        slug=record.slug,
        device_id=record.device.id,
        reason=reason,
        epoch=keeper.epoch,
        index=record.index,
        placement=keeper,
        move=move,
        home=_elsewhere(record, keeper, goals.homes) if move is Move.MIGRATION else "",
        waits_for=request.waits_for if request is not None and request.move is move else "",
    )


def _why_replace(record: DeviceRecord, keeper: Placement, goals: Goals) -> tuple[Move, str] | None:
    """The reason that comes first, in words; None = the placement is kept."""
    if reason := stranded(keeper, goals.reach):
        return Move.STRANDED, reason
    reasons = dict(_reasons(record, keeper, goals))
    if not reasons:
        return None
    first = min(reasons)
    return first, reasons[first]


def _reasons(record: DeviceRecord, keeper: Placement, goals: Goals) -> Iterator[tuple[Move, str]]:
    if keeper.state is PlacementState.LOST:
        return  # it may still be the accepted one, and no other agent could start (S3)
    request = goals.requested.get(record.slug)
    if request is not None and request.concerns(keeper):
        yield request.move, request.reason
    is_outdated = keeper.spec_hash != goals.spec_hash(record)
    if is_outdated and keeper.spec_hash in goals.given_up:
        yield Move.ROLLBACK, _outdated(record, keeper, goals.changes)
    if home := _elsewhere(record, keeper, goals.homes):
        # One move is enough for both: the next epoch has the current spec.
        yield Move.MIGRATION, f"it moves to {home}"
        return
    if reason := goals.stalled(keeper):
        yield Move.STALLED, reason
    if is_outdated:
        yield Move.ROLLOUT, _outdated(record, keeper, goals.changes)


def _outdated(record: DeviceRecord, keeper: Placement, changes: Changes) -> str:
    name = record.device.agent_class
    if keeper.agent_class and keeper.agent_class != name:
        return f"agent is of class `{keeper.agent_class}`, the device of class `{name}`"
    said = changes(name, keeper.spec_hash)
    return f"agent runs an old version of class `{name}`" + (f" ({said})" if said else "")


def _elsewhere(record: DeviceRecord, keeper: Placement, homes: BackendAssignment) -> str:
    """The scheduler that the agent should move to; "" = it is where it should be."""
    return "" if homes.is_at_goal(keeper, record) else homes.goal(record)


def _start(record: DeviceRecord, dead: tuple[Placement, ...], homes: BackendAssignment) -> Action:
    highest = max((p.epoch for p in dead), default=Epoch(0))
    # Its start may be in flight to the epoch's home: repeat it there, even if the device has moved since.
    unused = record.epoch > highest and not record.instance and record.epoch > 0
    home = homes.of(record) if unused else homes.for_start(record)
    epoch = record.epoch if unused else Epoch(max(record.epoch, highest) + 1)
    if unused:
        reason = f"no agent has reported at epoch {epoch} yet"
    elif record.epoch == 0:
        reason = "the device is new"
    else:
        last = next((p for p in dead if p.epoch == record.epoch), None)
        why = f": {last.reason}" if last is not None and last.reason else ""
        reason = f"the agent of epoch {record.epoch} is gone{why}"
    return Action(
        kind=ActionKind.START,
        slug=record.slug,
        device_id=record.device.id,
        reason=reason,
        epoch=epoch,
        index=record.index,
        home=home,
    )


def _retire(record: DeviceRecord | None, placement: Placement, reason: str) -> Iterator[Action]:
    if placement.state is PlacementState.STOPPING:
        return
    yield Action(
        kind=ActionKind.RETIRE,
        slug=placement.slug,
        device_id=placement.device_id,
        reason=reason,
        epoch=placement.epoch,
        index=record.index if record is not None else 0,
        placement=placement,
    )


def _strays(
    records: Mapping[Slug, DeviceRecord], placements: Placements, resting: AbstractSet[Slug]
) -> Iterator[Action]:
    if placements.keys() <= records.keys():
        return
    for slug in placements.keys() - records.keys() - resting:
        yield from decide_stray(placements[slug])


def decide_stray(found: tuple[Placement, ...]) -> Iterator[Action]:
    """The next actions for placements of a device that is not registered (rule 1)."""
    for placement in found:
        if placement.state is not _DEAD:
            yield from _retire(None, placement, "no such device is registered")


def _breaker(
    stops: list[Action], placements: Placements, limits: Limits, confirmed: frozenset[Stop]
) -> tuple[list[Action], frozenset[Stop], str]:
    """S7: more than max(breaker_min, breaker_fraction) stops in a pass are put on hold until confirmed."""
    if len(stops) <= limits.breaker_min:
        return stops, NO_STOPS, ""
    live = sum(p.state is not _DEAD for found in placements.values() for p in found)
    wanted = {stop_key(action) for action in stops}
    found = holds.decide(holds.STOPS, wanted, confirmed, limits, total=live)
    return [a for a in stops if stop_key(a) in found.go], found.held, found.reason


def stop_key(action: Action) -> Stop:
    """Identity of a stop for the breaker."""
    ref = action.placement.ref if action.placement is not None else ""
    return (action.slug, action.epoch, ref)
