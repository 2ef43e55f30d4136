"""Which agents leave their hosts, because a host is being drained, and what they wait for.

An agent leaves only if another host of its scheduler takes agents, and while no agent of its class waits for a host. Of
each class one agent goes first: the others follow when it has a place, so that a cluster without room costs one agent of
the class, and not as many as the window permits.
Only one replica moves agents of draining hosts at a time: the holder of the lowest shard that has any to move. Together
with the window, which counts the devices of all replicas, this keeps to one window for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.core.actions import Move
from nomad_watchdog.core.moves import MoveRequest, Requested
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.model import DeviceRecord, Epoch, Monotonic, Placement, PlacementState, Presence

Placements = Mapping[Slug, tuple[Placement, ...]]
_MOVABLE: Final = frozenset(
    {PlacementState.RUNNING, PlacementState.STARTING, PlacementState.RESTARTING}
)
"""States in which an agent can leave. A lost one may still be the accepted one, and no other could start (S3)."""
QUEUED_S: Final = 5.0
"""An agent that has waited for a host for this time, in seconds, does not only wait for the scheduler to decide."""
SCOUT_S: Final = 300.0
"""Time after which another agent goes first, if one that went has neither a place nor waits for a host."""
NO_OTHER: Final = "no other node takes agents"
_FIRST: Final = "the agent of {}, which is moved first, has no place on another node yet"
NOT_OUR_TURN: Final = "another replica moves the agents of its shards first"


@dataclass(frozen=True, slots=True)
class LeavingHost:
    """A host that agents are to leave."""

    name: str
    state: str
    """Short text for people, such as "draining until 2026-11-30T05:00:00Z"."""
    node_ids: frozenset[str] = frozenset()
    """Which nodes of this name; empty = the name is unique."""
    is_last: bool = False
    """No host of its scheduler takes agents now."""

    def has(self, placement: Placement) -> bool:
        """Whether a placement is on this host."""
        if placement.node != self.name:
            return False
        # A node of another scheduler may have the same name.
        return placement.node_id in self.node_ids if self.node_ids else not placement.node_id


@dataclass(frozen=True, slots=True)
class DrainView:
    """What a decision is based on."""

    hosts: tuple[LeavingHost, ...]
    records: Mapping[Slug, DeviceRecord]
    """Of all replicas."""
    placements: Placements
    shard: Callable[[Slug], Shard]
    ours: AbstractSet[Shard]
    """The shards that this replica decides about."""
    now: Monotonic
    rests: Callable[[Slug], bool] = lambda _slug: False
    """Whether nothing is done for a device now: it is paused, for example."""
    unwell: Callable[[Slug], bool] = lambda _slug: False
    """Whether something is wrong with a device."""
    no_room: str = ""
    """Why the scheduler has no room; "" = it has."""
    blocked: Callable[[str], str] = lambda _agent_class: ""
    """Why no agent of a class can be started now; "" = they can."""


@dataclass(frozen=True, slots=True)
class DrainDecision:
    """Which placements are to be left now, and which hosts wait."""

    requested: Requested = field(default_factory=dict)
    waits: Mapping[str, str] = field(default_factory=dict)
    """Host from which no agent can move → why, in words."""


NOTHING: Final = DrainDecision()


@dataclass(frozen=True, slots=True)
class _Candidate:
    placement: Placement
    host: LeavingHost
    agent_class: str
    """The class of its successor."""

    @property
    def slug(self) -> Slug:
        return self.placement.slug


@dataclass(frozen=True, slots=True)
class _Scout:
    """The agent of a class that goes first."""

    slug: Slug
    epoch: Epoch
    """Of the placement that it leaves. References can stay the same: a Nomad job that is updated in place."""
    since: Monotonic


@dataclass(slots=True)
class DrainPlanner:
    """Decides what leaves, and remembers which classes have found room elsewhere."""

    _scouts: dict[str, _Scout] = field(default_factory=dict)
    _roomy: set[str] = field(default_factory=set)
    """Classes of which an agent that left has found a place."""
    _queued: dict[Slug, Monotonic] = field(default_factory=dict)
    """Devices whose agent waits for a host, and since when."""
    _moving: dict[Slug, Monotonic] = field(default_factory=dict)
    """Devices of all replicas whose agent has left a host and has no place yet, and since when."""

    def decide(self, view: DrainView) -> DrainDecision:
        """What leaves now. No cost without a host to leave."""
        if not view.hosts:
            for memory in (self._scouts, self._roomy, self._queued, self._moving):
                memory.clear()
            return NOTHING
        found = list(_candidates(view))
        waiting = _waiting_for_a_host(view)
        self._queued = {slug: self._queued.get(slug, view.now) for slug in waiting}
        stuck = {s for s, since in self._queued.items() if view.now - since >= QUEUED_S}
        reported = _by_class(waiting[slug] for slug in stuck)
        self._moving = {slug: self._moving.get(slug, view.now) for slug in _without_place(view)}
        self._remember(view, {one.agent_class for one in found} - reported.keys())
        queued = _by_class(waiting.values()) | reported
        lasting = {name: why for name, why in queued.items() if name not in self._roomy}
        obstacles = {one.slug: _obstacle(one, view, lasting) for one in found}
        free = [one for one in found if not obstacles[one.slug]]
        # By what all replicas see, not by which classes this one has found room for: else two could have the turn.
        may = [one.slug for one in found if not _obstacle(one, view, reported)]
        turn = min(map(view.shard, may), default=None)
        ours = [one for one in free if turn in view.ours and view.shard(one.slug) in view.ours]
        scouted = self._scouted(ours, view)
        requested: dict[Slug, MoveRequest] = {}
        for one in found:
            reason = f"node {one.host.name} is {one.host.state}"
            why = obstacles[one.slug] or scouted.get(one.slug, NOT_OUR_TURN)
            old = one.placement
            requested[one.slug] = MoveRequest(Move.DRAIN, old.ref, reason, why, old.epoch)
        return DrainDecision(requested, dict(_waiting_hosts(found, view, reported)))

    def _remember(self, view: DrainView, may_be_roomy: AbstractSet[str]) -> None:
        """Note which agents that went first have found a place. `may_be_roomy`: the classes of which an agent is to
        leave and none has waited for long."""
        for name, scout in list(self._scouts.items()):
            record = view.records.get(scout.slug)
            is_gone = record is None or record.presence is not Presence.PRESENT
            if is_gone or view.now - scout.since > SCOUT_S:
                del self._scouts[name]
            elif _has_place(view.placements.get(scout.slug, ()), record, scout.epoch):
                del self._scouts[name]
                self._roomy.add(name)
        self._roomy &= may_be_roomy

    def _scouted(self, ours: list[_Candidate], view: DrainView) -> dict[Slug, str]:
        """What each of our agents that could leave waits for; "" = nothing."""
        by_class: dict[str, list[_Candidate]] = defaultdict(list)
        for one in ours:
            by_class[one.agent_class].append(one)
        found: dict[Slug, str] = {}
        for name, some in by_class.items():
            if name in self._roomy:
                found |= {one.slug: "" for one in some}
                continue
            if name not in self._scouts and (other := self._scout_of_others(name, view)):
                found |= dict.fromkeys((one.slug for one in some), _FIRST.format(other))
                continue
            if name not in self._scouts:
                first = min(some, key=lambda one: (view.unwell(one.slug), one.slug))
                self._scouts[name] = _Scout(first.slug, first.placement.epoch, view.now)
            scout = self._scouts[name].slug
            device = view.records[scout].device.id
            why = _FIRST.format(device)
            found |= {one.slug: "" if one.slug == scout else why for one in some}
        return found

    def _scout_of_others(self, agent_class: str, view: DrainView) -> str:
        """The device of a class whose agent another replica has moved and that has no place yet; "" = none."""
        for slug, since in self._moving.items():
            device = view.records[slug].device
            if device.agent_class == agent_class and view.now - since <= SCOUT_S:
                return device.id
        return ""


def _candidates(view: DrainView) -> Iterator[_Candidate]:
    """The agents on hosts that are to be left."""
    hosts: dict[str, list[LeavingHost]] = defaultdict(list)
    for host in view.hosts:
        hosts[host.name].append(host)
    for slug, found in view.placements.items():
        for one in found:
            there = next((host for host in hosts.get(one.node, ()) if host.has(one)), None)
            record = view.records.get(slug)
            if (
                there is not None
                and record is not None
                and record.presence is Presence.PRESENT
                and one.epoch == record.epoch
                and one.state in _MOVABLE
                and not one.queued
                and not view.rests(slug)
            ):
                yield _Candidate(one, there, record.device.agent_class)


def _waiting_for_a_host(view: DrainView) -> dict[Slug, Placement]:
    """The placements that wait for a host, and not for the end of an earlier one that is replaced in place."""
    found = {}
    for slug, placements in view.placements.items():
        live = [one for one in placements if one.state is not PlacementState.DEAD]
        if live and all(one.queued for one in live):
            found[slug] = live[-1]
    return found


def _without_place(view: DrainView) -> Iterator[Slug]:
    """The present devices whose agent has left a host that is to be left, and that have no other yet."""
    for slug, found in view.placements.items():
        record = view.records.get(slug)
        if record is None or record.presence is not Presence.PRESENT:
            continue
        left = [
            one.epoch
            for one in found
            if one.epoch < record.epoch and any(host.has(one) for host in view.hosts)
        ]
        if left and not _has_place(found, record, max(left)):
            yield slug


def _by_class(waiting: Iterable[Placement]) -> dict[str, str]:
    """Agent class → why an agent of it waits for a host."""
    return {
        one.agent_class: f"an agent of class {one.agent_class} waits for a node: {one.reason}"
        for one in waiting
    }


def _obstacle(one: _Candidate, view: DrainView, queued: Mapping[str, str]) -> str:
    """Why an agent can't leave now, whoever's turn it is; "" = it can."""
    if one.host.is_last:
        return NO_OTHER
    return view.no_room or queued.get(one.agent_class, "") or view.blocked(one.agent_class)


def _has_place(found: Iterable[Placement], record: DeviceRecord | None, left: Epoch) -> bool:
    """Whether a device has an agent on a host again, at its record's epoch and after the epoch that it left."""
    return any(
        record is not None
        and one.epoch == record.epoch
        and one.epoch > left
        and one.state in _MOVABLE
        and not one.queued
        for one in found
    )


def _waiting_hosts(
    found: Iterable[_Candidate], view: DrainView, queued: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """The hosts from which no agent can move, and why. Waiting for one's turn is no reason."""
    by_host: dict[str, list[str]] = defaultdict(list)
    for one in found:
        by_host[one.host.name].append(_obstacle(one, view, queued))
    for name, whys in by_host.items():
        if all(whys):
            yield name, whys[0]
