"""The state of the explorer's small world, as nested tuples, and the real code's decisions on it.

A device is ``(record, jobs, zombies, wire, acked)``: the registry's record, the jobs that the
scheduler lists, processes that it has lost sight of, start requests still in transit, and the last
request that was acknowledged as stored. A replica is ``(read, looked, views, listing, confirmed,
twice)``.

A record is ``()`` or ``(present, generation, epoch, instance)``. Each write changes one of the last
three permanently, so equal content means an equal index, and the state needs no counter.

The last part of a state is what is left of deleted tombstones: ``(floor, generation, left,
buried)``, the registry's floor, how many more may be deleted, and for each device the highest epoch
so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Final

from nomad_watchdog.core import acceptance, planner, presence, tombstones
from nomad_watchdog.core.acceptance import AcceptanceKind
from nomad_watchdog.core.actions import ActionKind
from nomad_watchdog.core.goals import Goals
from nomad_watchdog.core.mass_stop_breaker import MassStopBreaker
from nomad_watchdog.core.planner import Stop
from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import (
    Device,
    DeviceRecord,
    Epoch,
    Limits,
    Placement,
    PlacementState,
    Presence,
    WallTime,
)

Rec = tuple[Any, ...]
Job = tuple[int, str, int]
"""Epoch, state (R running, S stopping, L lost, l lost and stopping, D dead), instance."""
Jobs = tuple[Job, ...]
Dev = tuple[Rec, Jobs, tuple[Any, ...], tuple[int, ...], int]
View = tuple[Rec, Jobs, int, int, tuple[int, ...]]
"""Record, jobs, whether the jobs are older than the record, whether a start is unseen, action in
hand."""
Keys = tuple[tuple[int, int], ...]
"""Stops: device and epoch."""
Rep = tuple[int, int, tuple[View, ...], tuple[Any, ...], Keys, Keys]
Graves = tuple[int, int, int, tuple[int, ...]]
State = tuple[tuple[Dev, ...], tuple[Rep, ...], int, int, Graves]
"""Devices, replicas, requests left, faults left, what is left of deleted tombstones."""

START: Final = 1
STOP: Final = 2
FIRST: Final = 3
"""In hand: the floor that was read for the first start of a record, before its epoch is
committed."""
BURY: Final = 4
"""In hand: the epoch of a tombstone that is to be deleted, now that the floor is raised."""
NAMES: Final = ("a", "b")
CLASS: Final = "default"
GOALS: Final = Goals({CLASS: "h"})
LIMITS: Final = Limits(breaker_min=1, breaker_fraction=0.0)
NO_BREAKER: Final = Limits(breaker_min=99)
NO_VIEW: Final[View] = ((), (), 0, 0, ())

_DEVICES: Final = tuple(Device(DeviceId(name), CLASS, "127.0.0.1") for name in NAMES)
SLUGS: Final = tuple(slug_of(device.id) for device in _DEVICES)
_NUMBER: Final = {slug: number for number, slug in enumerate(SLUGS)}
_STATES: Final = {
    "R": PlacementState.RUNNING,
    "S": PlacementState.STOPPING,
    "L": PlacementState.LOST,
    "l": PlacementState.LOST,
    "D": PlacementState.DEAD,
}


@cache
def record_of(device: int, rec: Rec) -> DeviceRecord:
    """The record as in the registry."""
    present, generation, epoch, instance = rec
    return DeviceRecord(
        slug=SLUGS[device],
        device=_DEVICES[device],
        presence=Presence.PRESENT if present else Presence.ABSENT,
        generation=generation,
        epoch=Epoch(epoch),
        instance=_instance(epoch, instance) if instance else "",
        changed_at=WallTime(0.0),
        index=1 + instance + 10 * epoch + 100 * generation,
    )


def rec_of(record: DeviceRecord) -> Rec:
    """The inverse of `record_of`."""
    number = int(record.instance.rpartition(".")[2]) if record.instance else 0
    return (
        int(record.presence is Presence.PRESENT),
        record.generation,
        int(record.epoch),
        number,
    )


def _instance(epoch: int, number: int) -> str:
    return f"i{epoch}.{number}"


@cache
def placements_of(device: int, jobs: Jobs) -> tuple[Placement, ...]:
    """The placements as the scheduler would list them."""
    return tuple(
        Placement(
            slug=SLUGS[device],
            device_id=_DEVICES[device].id,
            epoch=Epoch(epoch),
            agent_class=CLASS,
            spec_hash="h",
            state=_STATES[state],
            ref=str(epoch),
            instances=() if state == "D" else (_instance(epoch, number),),
        )
        for epoch, state, number in jobs
    )


@cache
def registered(device: int, rec: Rec, present: int, generation: int) -> Rec:
    """`core.presence` on a request; () = it changes nothing. `generation`: the floor's current one.
    A replica may know an older one, but the store's index distinguishes the records, where here
    only their content does."""
    stored = record_of(device, rec) if rec else None
    if present:
        changed = presence.register(stored, _DEVICES[device], WallTime(0.0), generation=generation)
    else:
        changed = presence.deregister(stored, WallTime(0.0)) if stored is not None else None
    return rec_of(changed) if changed is not None else ()


@cache
def advanced(device: int, rec: Rec, epoch: int) -> Rec:
    """`core.presence` on a new placement."""
    return rec_of(presence.advance(record_of(device, rec), Epoch(epoch)))


@cache
def first(device: int, rec: Rec, floor: int) -> int:
    """`core.tombstones` on the first epoch of a record."""
    return int(EpochFloor(Epoch(floor)).first(record_of(device, rec), Epoch(rec[2] + 1)))


@cache
def due(device: int, rec: Rec, jobs: Jobs) -> bool:
    """`core.tombstones` on an expired record."""
    listed = {SLUGS[device]} if any(state != "D" for _, state, _ in jobs) else set()
    return bool(tombstones.expired([record_of(device, rec)], listed, WallTime(1.0), 0.0, 1))


def raised(state: State, d: int, rec: Rec) -> State:
    """`RecordCache.forget`, first half: the floor is at the tombstone's epoch or above."""
    epoch, generation, left, buried = state[4]
    floor = EpochFloor(Epoch(epoch), generation).over([record_of(d, rec)])
    return (*state[:4], (int(floor.epoch), floor.generation, left, buried))


def deleted(state: State, d: int) -> State:
    """`RecordCache.forget`, second half: the tombstone is gone."""
    rec = state[0][d][0]
    epoch, generation, left, buried = state[4]
    below = (*buried[:d], max(buried[d], rec[2]), *buried[d + 1 :])
    after = with_device(state, d, ((), *state[0][d][1:]))
    return (*after[:4], (epoch, generation, left - 1, below))


@cache
def bound(device: int, rec: Rec, epoch: int, number: int) -> Rec:
    """`core.presence` on a first report."""
    return rec_of(presence.bind(record_of(device, rec), _instance(epoch, number)))


@cache
def judged(device: int, rec: Rec, epoch: int, number: int, jobs: Jobs) -> AcceptanceKind:
    """`core.acceptance` on a report; `jobs`: as listed, () when the listing is too old to count."""
    live = {
        instance
        for placement in placements_of(device, jobs)
        if placement.epoch == epoch
        for instance in placement.instances
    }
    record = record_of(device, rec) if rec else None
    return acceptance.accept(record, Epoch(epoch), _instance(epoch, number), live).kind


@cache
def planned(
    seen: tuple[tuple[Rec, Jobs], ...], confirmed: Keys, breaker: bool = True
) -> tuple[tuple[tuple[int, int, int], ...], Keys, Keys]:
    """`core.planner` on a replica's views: (kind, device, epoch) of each action, the stops on hold,
    and the stops that are released. `breaker`: whether it limits them."""
    records = {SLUGS[i]: record_of(i, rec) for i, (rec, _) in enumerate(seen) if rec}
    placements = {SLUGS[i]: placements_of(i, jobs) for i, (_, jobs) in enumerate(seen) if jobs}
    limits = LIMITS if breaker else NO_BREAKER  # as an argument it would be hashed each time
    made = planner.plan(records, placements, GOALS, limits, confirmed=_stops(confirmed))
    actions = tuple(
        (
            START if action.kind is ActionKind.START else STOP,
            _NUMBER[action.slug],
            int(action.epoch),
        )
        for action in made.actions
    )
    going = tuple((device, epoch) for kind, device, epoch in actions if kind == STOP)
    return actions, _keys(made.held), going


def settled(rep: Rep, breaker: bool) -> Rep:
    """The replica after the pass that follows a change: `MassStopBreaker.update` on the new
    plan."""
    read, looked, views, listing, confirmed, twice = rep
    if not (read and looked and (confirmed or twice)):
        return rep
    _, held, going = planned(tuple([(v[0], v[1]) for v in views]), confirmed, breaker)
    kept = tuple(key for key in confirmed if key in going)
    return (read, looked, views, listing, kept, tuple(key for key in twice if key in held))


def read_again(views: Iterable[View], held: Keys, confirmed: Keys) -> tuple[Keys, Keys]:
    """`MassStopBreaker.read_again`: what is confirmed and what has been read twice."""
    breaker = MassStopBreaker(held=_stops(held), confirmed=_stops(confirmed))
    breaker.read_again(_stops(held), {SLUGS[i] for i, view in enumerate(views) if view[0]})
    return _keys(breaker.confirmed), _keys(breaker.read_twice)


def _stops(keys: Keys) -> frozenset[Stop]:
    return frozenset((SLUGS[device], Epoch(epoch), str(epoch)) for device, epoch in keys)


def _keys(stops: Iterable[tuple[Slug, Epoch, str]]) -> Keys:
    return tuple(sorted((_NUMBER[slug], int(epoch)) for slug, epoch, _ in stops))


def swapped(rep: Rep) -> Rep:
    """A replica with its two devices swapped."""
    read, looked, views, listing, confirmed, twice = rep

    def keys(some: Keys) -> Keys:
        return tuple(sorted((1 - device, epoch) for device, epoch in some))

    return (read, looked, views[::-1], listing[::-1], keys(confirmed), keys(twice))


class BrokenError(Exception):
    """A step broke a promise; the message begins with its number."""


def worsened(state: State) -> State:
    """With one fault fewer to come."""
    return (*state[:3], state[3] - 1, state[4])


def with_device(state: State, d: int, device: Dev) -> State:
    devices = state[0]
    return ((*devices[:d], device, *devices[d + 1 :]), *state[1:])


def with_replica(state: State, r: int, rep: Rep) -> State:
    replicas = state[1]
    return (state[0], (*replicas[:r], rep, *replicas[r + 1 :]), *state[2:])


def with_view(state: State, r: int, d: int, view: View, *, late: bool = False) -> State:
    """`late`: a listing in progress was begun too early to show the latest action."""
    read, looked, views, listing, confirmed, twice = state[1][r]
    if late and listing:
        listing = (*listing[:d], (listing[d][0], 0), *listing[d + 1 :])
    changed: Rep = (read, looked, (*views[:d], view, *views[d + 1 :]), listing, confirmed, twice)
    return with_replica(state, r, changed)


def with_hand(state: State, r: int, d: int, hand: tuple[int, ...]) -> State:
    rec, jobs, unseen, expects, _ = state[1][r][2][d]
    return with_view(state, r, d, (rec, jobs, unseen, expects, hand))


def learned(state: State, r: int, d: int, rec: Rec) -> State:
    """`RecordCache.learn`, and `ListingFreshness.learned`."""
    known, jobs, unseen, expects, hand = state[1][r][2][d]
    if known == rec:
        return state
    if hand and hand[0] in (FIRST, BURY):
        hand = ()  # it was decided on another record, whose index it would name
    moved = rec and rec[2] and (not known or known[2:] != rec[2:])
    view = (rec, jobs, 1 if moved else unseen, expects, hand)
    return with_view(state, r, d, view, late=bool(moved))


def listing_of(devices: tuple[Dev, ...]) -> tuple[tuple[Jobs, int], ...]:
    return tuple((device[1], 1) for device in devices)


def listed(rep: Rep) -> Rep:
    """`Reconciler._take` and `ListingFreshness.listed`."""
    read, _, views, listing, confirmed, twice = rep
    seen = tuple(
        (rec, jobs, 0 if young else unseen, 0 if young else expects, hand)
        for (rec, _, unseen, expects, hand), (jobs, young) in zip(views, listing, strict=True)
    )
    return (read, 1, seen, (), confirmed, twice)


def placed(device: Dev, epoch: int, step: str) -> Dev:
    """`Scheduler.ensure` when it arrives, and checks of what it must not do. `step`: for the
    message."""
    rec, jobs, zombies, wire, acked = device
    if any(epoch == one for one, _, _ in jobs):
        return device
    committed = rec[2] if rec else 0
    if epoch > committed:
        raise BrokenError(f"S2: a start at epoch {epoch}, but {committed} is committed: {step}")
    if epoch < committed:
        raise BrokenError(f"S2: a start at epoch {epoch} after {committed} was committed: {step}")
    beside = [one for one in jobs if one[1] != "D"]
    if beside:
        raise BrokenError(f"S3: a start at epoch {epoch} beside epoch {beside[0][0]}: {step}")
    return (rec, tuple(sorted((*jobs, (epoch, "R", 1)))), zombies, wire, acked)


def stopped(device: Dev, epoch: int) -> Dev:
    """`Scheduler.retire` when it arrives."""
    rec, jobs, zombies, wire, acked = device
    told = {"R": "S", "L": "l"}
    after = tuple((e, told.get(s, s) if e == epoch else s, n) for e, s, n in jobs)
    return (rec, after, zombies, wire, acked)


def check_write(before: Dev, after: Dev, buried: int, step: str) -> None:
    """Check S1 and S2 at each write of a record. `buried`: the highest epoch of a deleted
    tombstone. `step`: for the message."""
    old, new = before[0], after[0]
    if 0 < new[2] <= buried:
        raise BrokenError(f"S2: epoch {new[2]} is committed, and {buried} had been: {step}")
    if new[2] < old[2]:
        raise BrokenError(f"S1: the epoch went from {old[2]} to {new[2]}: {step}")
    if old[3] and new[2] == old[2] and new[3] != old[3]:
        listed = any((e, n) == (old[2], old[3]) and s != "D" for e, s, n in before[1])
        if listed:
            raise BrokenError(f"S1: another instance is accepted while the first may live: {step}")


def check_devices(devices: tuple[Dev, ...]) -> None:
    """Check S4 in each state."""
    for d, (rec, *_, acked) in enumerate(devices):
        stored = 1 if rec and rec[0] else 2
        if acked and acked != stored:
            raise BrokenError(f"S4: an acknowledged request for {NAMES[d]} is not stored")
