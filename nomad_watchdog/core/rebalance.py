"""Rebalancing: which agents leave their hosts so that every host has about the same number of agents.

The leader calls `step` again and again with what is seen of the fleet, and stores the result. Each result names the few
agents that leave their hosts now (`Rebalance.going`) and the hosts that the scheduler should avoid for them. A device is
moved at most once by one rebalance, so nothing goes back and forth. A rebalance ends when the hosts are balanced, when the
requested number of devices has been moved, or when moves do not help.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import accumulate
from typing import Final

from nomad_watchdog.core.actions import Move
from nomad_watchdog.core.host_balance import MovePlan, allowed, plan_moves, spread
from nomad_watchdog.core.moves import MoveRequest, Requested
from nomad_watchdog.core.pauses import Target
from nomad_watchdog.errors import ConflictError, NotFoundError, PreconditionError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    DeviceRecord,
    Epoch,
    Placement,
    PlacementState,
    Presence,
    WallTime,
)

TRIES: Final = 3
"""Number of consecutive moves that may end on a host that has its share already."""
# The next limits keep the stored document below `registry.MAX_DOCUMENT`, with the longest names that occur.
MAX_AVOIDED: Final = 8_000
"""Maximum length of the names of the hosts that a start avoids, characters: those with the most agents. They are also part
of each agent's job."""
MAX_AT_ONCE: Final = 50
"""Maximum number of agents that are being moved at a time."""
MAX_MOVED: Final = 3_000
"""Maximum number of devices that one rebalance moves."""
_GONE: Final = (PlacementState.DEAD, PlacementState.STOPPING)
MARK: Final = 10
"""Length of a mark, hexadecimal digits."""


class RebalanceState(StrEnum):
    """State of a rebalance."""

    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    """The hosts are balanced, or as many devices as requested have been moved."""
    ENDED = "ended"
    """The hosts are not balanced, and no further move would help."""
    ABORTED = "aborted"
    """An operator ended it."""


OVER: Final = (RebalanceState.DONE, RebalanceState.ENDED, RebalanceState.ABORTED)


@dataclass(frozen=True, slots=True)
class Going:
    """An agent that is being moved: it is to leave this placement."""

    ref: str
    epoch: Epoch
    """Of the placement. Once the record has a higher one, the move has begun."""
    host: str


@dataclass(frozen=True, slots=True)
class Rebalance:
    """A rebalance of a fleet, as it is stored."""

    id: str
    began: WallTime
    by: str
    target: Target | None = None
    """Which devices may be moved; None = all."""
    most: int = 0
    """Maximum number of devices to move; 0 = no limit."""
    state: RebalanceState = RebalanceState.RUNNING
    reason: str = ""
    """Why it is over, in words."""
    going: Mapping[Slug, Going] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()
    """Marks (`mark`) of the devices whose move was requested, whether it has ended or not."""
    avoid: tuple[str, ...] = ()
    """Hosts that the scheduler should not choose for the agents that are being moved."""
    arrived: int = 0
    """Number of devices that have been moved."""
    useful: int = 0
    """Number of moves that ended on a host that was to get an agent."""
    useless: int = 0
    """Number of consecutive moves, the last ones, that did not."""
    unusable: frozenset[str] = frozenset()
    """Hosts that have no agents, and to which the scheduler moved none."""

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def left(self) -> int:
        """Maximum number of further moves."""
        asked = (self.most or MAX_MOVED) - self.arrived - len(self.going)
        return max(0, min(asked, MAX_MOVED - len(self.moved)))

    def may_move(self, record: DeviceRecord) -> bool:
        """Whether it may move this device and has not done so."""
        return (self.target is None or self.target.matches(record.device)) and mark(
            record.slug
        ) not in self.moved


@dataclass(frozen=True, slots=True)
class AgentsByHost:
    """The agents per host, as the leader sees them."""

    counts: Mapping[str, int]
    """Host that takes new agents → number of agents there. Agents that are to leave it do not count."""
    movable: Mapping[str, tuple[Placement, ...]] = field(default_factory=dict)
    """Host → agents that may leave it now, in order."""
    arrived: Mapping[Slug, str] = field(default_factory=dict)
    """Devices whose move has ended → their host; "" = one that takes no new agents."""
    dropped: frozenset[Slug] = frozenset()
    """Devices that have left, or that can't be moved any more before their move has begun."""
    pending: frozenset[Slug] = frozenset()
    """Devices whose move is requested and has not begun."""
    in_flight: int = 0
    """Number of agents that are being moved and are not ready on a new host yet, with `pending`."""
    waiting: frozenset[str] = frozenset()
    """Hosts with devices that can't be moved now, but perhaps later: unhealthy ones, or those whose agents are not ready."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is asked about a device to decide whether its agent may be moved."""

    may_leave: Callable[[DeviceRecord], bool]
    """It is healthy, its agent is ready, and nothing prevents actions for it."""
    is_ready: Callable[[Slug], bool]
    """The accepted agent is ready."""
    is_stuck: Callable[[Slug], bool]
    """Its agent has had its time to become ready, and is not."""


def mark(slug: Slug) -> str:
    """A short mark of a device. Two devices with one mark count as one, so one of them is not moved."""
    return hashlib.sha256(slug.encode()).hexdigest()[:MARK]


def survey(
    now: Rebalance,
    records: Mapping[Slug, DeviceRecord],
    placements: Mapping[Slug, tuple[Placement, ...]],
    hosts: Collection[str] | None,
    closed: Collection[str],
    conditions: Conditions,
) -> AgentsByHost:
    """What one step is decided on. `hosts`: those that take new agents; None = not known, then those with agents. `closed`:
    hosts that take no new agents, and whose agents are not moved here."""
    where = {
        slug: one for slug, found in placements.items() if (one := _current(found)) is not None
    }
    if hosts is None:
        hosts = {one.node for one in where.values() if one.state is not PlacementState.LOST}
    usable = frozenset(hosts) - frozenset(closed) - now.unusable - {""}
    staying = {s: p for s, p in where.items() if p.node in usable and s not in now.going}
    counts = dict.fromkeys(sorted(usable), 0) | Counter(one.node for one in staying.values())
    movable, waiting = _candidates(now, records, staying, conditions)
    arrived: dict[Slug, str] = {}
    phases: dict[_Phase, set[Slug]] = {phase: set() for phase in _Phase}
    for slug, going in now.going.items():
        record, found = records.get(slug), where.get(slug)
        phase = _phase(going, record, found, usable, conditions)
        phases[phase].add(slug)
        if found is not None and phase in (_Phase.DROPPED, _Phase.ARRIVED):
            here = found.node in usable
            counts |= {found.node: counts[found.node] + 1} if here else {}
            if phase is _Phase.ARRIVED:
                arrived[slug] = found.node if here else ""
    return AgentsByHost(
        counts,
        movable,
        arrived,
        frozenset(phases[_Phase.DROPPED]),
        frozenset(phases[_Phase.PENDING]),
        len(phases[_Phase.PENDING]) + len(phases[_Phase.BEGUN]),
        frozenset(waiting),
    )


def _candidates(
    now: Rebalance,
    records: Mapping[Slug, DeviceRecord],
    staying: Mapping[Slug, Placement],
    conditions: Conditions,
) -> tuple[dict[str, tuple[Placement, ...]], set[str]]:
    """By host: the agents that may leave it now, in order; and the hosts with some that perhaps may later."""
    movable: dict[str, list[Placement]] = {}
    waiting: set[str] = set()
    for slug, one in staying.items():
        record = records.get(slug)
        if record is None or record.presence is not Presence.PRESENT or not now.may_move(record):
            continue
        if _runs(one, record) and conditions.may_leave(record):
            movable.setdefault(one.node, []).append(one)
        else:
            waiting.add(one.node)
    return {host: tuple(sorted(some, key=_slug)) for host, some in movable.items()}, waiting


def _slug(placement: Placement) -> Slug:
    return placement.slug


class _Phase(StrEnum):
    DROPPED = "dropped"
    PENDING = "pending"
    BEGUN = "begun"
    """No agent of the new epoch is known to be ready."""
    ARRIVED = "arrived"


def _phase(
    going: Going,
    record: DeviceRecord | None,
    found: Placement | None,
    usable: Collection[str],
    conditions: Conditions,
) -> _Phase:
    if record is None or record.presence is not Presence.PRESENT:
        return _Phase.DROPPED
    if record.epoch == going.epoch:
        stays = going.host not in usable or not conditions.may_leave(record)
        return _Phase.DROPPED if stays else _Phase.PENDING
    if found is None or not _runs(found, record):
        return _Phase.BEGUN
    # While a job is updated in place, its listing may still have the run that ends, and its host.
    is_ready = record.instance in found.instances and conditions.is_ready(record.slug)
    return _Phase.ARRIVED if is_ready or conditions.is_stuck(record.slug) else _Phase.BEGUN


def _runs(placement: Placement, record: DeviceRecord) -> bool:
    return placement.state is PlacementState.RUNNING and placement.epoch == record.epoch


def _current(found: tuple[Placement, ...]) -> Placement | None:
    """The newest placement of a device that stays."""
    live = [one for one in found if one.state not in _GONE]
    return max(live, key=lambda one: one.epoch, default=None)


def step(
    now: Rebalance,
    view: AgentsByHost,
    window: int,
    *,
    is_idle: bool = False,
) -> Rebalance:
    """The next state of a rebalance. `window`: maximum number of agents that are being moved at a time. `is_idle`: nothing
    has changed for so long that devices that can't be moved now are not waited for."""
    now = _settled(now, view)
    if now.state is not RebalanceState.RUNNING or not view.counts:
        return now
    if now.useless >= TRIES:
        return now if now.going else _useless(now, view)
    # A scheduler that has not shown that it moves agents to hosts with room gets only a few to move.
    limit = min(window, MAX_AT_ONCE)
    if not now.useful or now.useless:
        limit = min(limit, TRIES - now.useless)
    planned = plan_moves(view.counts, view.movable, view.in_flight)
    room = max(planned.receive.values(), default=0)
    free = min(limit - len(now.going), room - view.in_flight, now.left)
    chosen = planned.leave[: max(0, free)]
    if not chosen and not now.going:
        return _over(now, view, is_idle=is_idle)
    new = {one.slug: Going(one.ref, one.epoch, one.node) for one in chosen}
    return replace(
        now,
        going={**now.going, **new},
        moved=now.moved | {mark(slug) for slug in new},
        avoid=_avoided(view, planned, max(1, min(view.in_flight + len(new), room))),
    )


def _avoided(view: AgentsByHost, planned: MovePlan, arriving: int) -> tuple[str, ...]:
    """The hosts that are to get fewer agents than may arrive at once. Whichever other host the scheduler chooses for each
    of them, none gets more than planned."""
    full = sorted(
        (host for host in view.counts if planned.receive.get(host, 0) < arriving),
        key=lambda host: (-view.counts[host], host),
    )
    ends = accumulate(len(host) + 1 for host in full)
    return tuple(sorted(host for host, end in zip(full, ends, strict=True) if end <= MAX_AVOIDED))


def _settled(now: Rebalance, view: AgentsByHost) -> Rebalance:
    """Without the moves that have ended."""
    useful, useless = now.useful, now.useless
    wanted = _wanted(view) if view.arrived else {}
    for slug, host in view.arrived.items():
        helped = host != now.going[slug].host and wanted.get(host, 0) > 0
        wanted[host] = wanted.get(host, 0) - 1
        useful, useless = (useful + 1, 0) if helped else (useful, useless + 1)
    ended = view.arrived.keys() | view.dropped
    if now.is_over:
        ended |= view.pending
    if not ended:
        return now
    going = {slug: one for slug, one in now.going.items() if slug not in ended}
    avoid = now.avoid if going else ()
    arrived = now.arrived + len(view.arrived)
    return replace(now, going=going, avoid=avoid, arrived=arrived, useful=useful, useless=useless)


def _wanted(view: AgentsByHost) -> dict[str, int]:
    """The number of agents that each host was to get before those arrived whose moves have ended."""
    counts = dict(view.counts)
    for host in view.arrived.values():
        if host in counts:
            counts[host] -= 1
    return dict(plan_moves(counts, view.movable, view.in_flight + len(view.arrived)).receive)


def _useless(now: Rebalance, view: AgentsByHost) -> Rebalance:
    empty = frozenset(host for host, count in view.counts.items() if not count)
    if empty and len(empty) < len(view.counts):
        return replace(now, useless=0, unusable=now.unusable | empty)
    return replace(
        now,
        state=RebalanceState.ENDED,
        reason=f"the scheduler placed the last {now.useless} agents on hosts that have their share; {_differ(view)}",
    )


def _over(now: Rebalance, view: AgentsByHost, *, is_idle: bool) -> Rebalance:
    """As it ends; unchanged while devices may still become movable."""
    if spread(view.counts) <= allowed(view.counts):
        return replace(now, state=RebalanceState.DONE, reason=_differ(view))
    if not now.left:
        reason = f"{now.arrived} devices have been moved, the maximum; {_differ(view)}"
        return replace(now, state=RebalanceState.DONE, reason=reason)
    least, most = min(view.counts.values()), allowed(view.counts)
    if not is_idle and any(view.counts[host] - least > most for host in view.waiting):
        return now
    reason = f"no other agent can be moved; {_differ(view)}"
    return replace(now, state=RebalanceState.ENDED, reason=reason)


def _differ(view: AgentsByHost) -> str:
    counts = view.counts.values()
    return f"{len(view.counts)} hosts have {min(counts)} to {max(counts)} agents each"


def requested(now: Rebalance, records: Mapping[Slug, DeviceRecord]) -> Requested:
    """The placements to leave now."""
    if now.state is not RebalanceState.RUNNING:
        return {}
    return {
        slug: MoveRequest(Move.REBALANCE, one.ref, f"host {one.host} has more agents than others")
        for slug, one in now.going.items()
        if (record := records.get(slug)) is not None and record.epoch == one.epoch
    }


def avoided_by(now: Rebalance, record: DeviceRecord) -> tuple[str, ...]:
    """The hosts that the scheduler should avoid for the start of this record's epoch."""
    going = now.going.get(record.slug)
    return now.avoid if going is not None and record.epoch == going.epoch + 1 else ()


def begin(before: Rebalance | None, new: Rebalance) -> Rebalance:
    """Raises ConflictError while another rebalance is in progress."""
    if before is not None and not before.is_over:
        raise ConflictError(f"a rebalance is {before.state}; let it end, or abort it")
    return new


def control(now: Rebalance | None, what: str) -> Rebalance:
    """`pause`, `resume` or `abort`. Raises NotFoundError when none is in progress, PreconditionError when its state does
    not allow it."""
    if now is None or now.is_over:
        raise NotFoundError("no rebalance is in progress")
    if what == "pause":
        return replace(now, state=RebalanceState.PAUSED)
    if what == "abort":
        return replace(now, state=RebalanceState.ABORTED, reason="aborted by an operator")
    if now.state is not RebalanceState.PAUSED:
        raise PreconditionError(f"the rebalance is not paused, it is {now.state}")
    return replace(now, state=RebalanceState.RUNNING)
