"""Combines changes with one cause into one incident: of a gateway, a host, a site or a class.

`observe` records each change in constant time. `settle`, called every few seconds, opens and closes incidents: only
then is it known how many devices are affected. The group that explains most of the changes gets the incident. Changes
that one incident explains do not count for another, so that a dead host is not also reported as a site and a class.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Monotonic, Presence, VerdictState

MAX_MEMBERS: Final = 50
"""Maximum number of devices and of events that an incident names; all are counted."""
TROUBLE: Final = frozenset(
    {
        VerdictState.SUSPECT,
        VerdictState.DEGRADED,
        VerdictState.REPAIRING,
        VerdictState.OFFLINE,
        VerdictState.UNWATCHED,
        VerdictState.FAILING,
    }
)
"""A device that changes from another state to one of these has become unhealthy."""


class GroupKind(StrEnum):
    """What devices can have in common. Of equally good explanations, the first one is used."""

    GATEWAY = "gateway"
    """The gateway in front of the device: its label `gateway`, or as its agent reports."""
    HOST = "host"
    SITE = "site"
    CLASS = "class"


Group = tuple[GroupKind, str]
_RANK: Final = {kind: -rank for rank, kind in enumerate(GroupKind)}


@dataclass(frozen=True, slots=True)
class IncidentLimits:
    """An incident needs `least` unhealthy devices of a group, or this fraction of the group if that is more, within
    the window."""

    least: int = 3
    fraction: float = 0.20
    window_s: float = 60.0


class IncidentStep(StrEnum):
    """What happened to an incident."""

    OPENED = "opened"
    UPDATED = "updated"
    CLOSED = "closed"


@dataclass(slots=True)
class Incident:
    """The probable common cause of many changes."""

    id: str
    kind: GroupKind
    group: str
    size: int
    """Maximum number of devices in the group since it opened."""
    first_at: Monotonic
    """When the first of its devices became unhealthy."""
    last_at: Monotonic
    """When the last one did."""
    count: int = 0
    """Total number of devices that became unhealthy in it."""
    bad: int = 0
    """Number of its devices that are unhealthy now."""
    members: list[Slug] = field(default_factory=list)
    seen: set[Slug] = field(default_factory=set)
    """The counted devices, while it is open: a device that becomes unhealthy again counts once."""
    subsumes: list[int] = field(default_factory=list)
    """References of the individual events before it opened; the first MAX_MEMBERS."""
    closed_at: Monotonic | None = None
    told: int = 0
    """`count` when it was last published."""
    closes_below: float = 1.0
    """It closes when fewer devices than this are unhealthy."""
    stays_until: Monotonic = field(default=Monotonic(0.0))
    """For an incident that an earlier run opened: its devices are observed again until then, and it stays open."""


@dataclass(frozen=True, slots=True)
class News:
    """A step of an incident. `marks`: references of the individual events that belong to it."""

    step: IncidentStep
    incident: Incident
    marks: Sequence[int] = ()


@dataclass(slots=True)
class _Turn:
    """When a device became unhealthy, the reference of its event, and the groups that may explain it."""

    slug: Slug
    at: Monotonic
    ref: int
    groups: tuple[Group, ...]


@dataclass(slots=True)
class _Member:
    groups: tuple[Group, ...]
    bad: bool = False
    turn: _Turn | None = None
    """Its turn, while no incident explains it and it is within the window."""
    incident: Incident | None = None


@dataclass(slots=True)
class Correlator:
    """Groups of devices, the devices that recently became unhealthy, and the open incidents."""

    limits: IncidentLimits
    name: str = "incident"
    """Prefix of new incident ids."""
    opened: dict[Group, Incident] = field(default_factory=dict)
    number: int = 0
    """Number of the last incident."""
    given: dict[Group, str] = field(default_factory=dict)
    """Ids that other replicas gave to incidents of groups for which this replica has not opened one yet."""
    _members: dict[Slug, _Member] = field(default_factory=dict)
    _sizes: dict[Group, int] = field(default_factory=dict)
    _recent: dict[Group, dict[Slug, _Turn]] = field(default_factory=dict)
    _turns: deque[_Turn] = field(default_factory=deque)

    def observe(  # all but two by name
        self,
        slug: Slug,
        groups: tuple[Group, ...],
        *,
        bad: bool,
        now: Monotonic,
        ref: int = 0,
        only: GroupKind | None = None,
    ) -> str:
        """Record the state of a device. Returns the id of the open incident that explains it, or "".

        `ref` identifies its event. `only`: only a group of this kind can explain the state, if the device has one: an
        agent that can't probe has a problem of its host or of its gateway. An unhealthy device keeps the groups in
        which it became unhealthy, because its placement may be gone with its host."""
        member = self._members.get(slug) or self._first(slug, groups, now, ref, bad=bad)
        if member.bad and not bad:
            # Before its groups change: remove its turn from the groups in which it became unhealthy.
            member.bad = False
            self._recovered(member)
        if member.groups != groups and not (bad and member.bad and member.groups):
            self._regroup(member, groups)
        if bad:
            self._bad(slug, member, now, ref, only)
        return self.incident_of(slug)

    def _bad(
        self, slug: Slug, member: _Member, now: Monotonic, ref: int, only: GroupKind | None
    ) -> None:
        explaining = tuple(one for one in member.groups if one[0] is only) or member.groups
        if not member.bad:
            member.bad = True
            self._turned_bad(member, _Turn(slug, now, ref, explaining))
        elif only is not None and (turn := member.turn) is not None:
            # It was unhealthy already, and now the cause is known better.
            self._take_back(member)
            turn.groups = explaining
            self._turned_bad(member, turn, again=True)

    def _first(
        self, slug: Slug, groups: tuple[Group, ...], now: Monotonic, ref: int, *, bad: bool
    ) -> _Member:
        """Add a device. Its previous state is unknown, so it does not count as changed."""
        member = self._members[slug] = _Member((), bad=bad)
        if bad:
            self._resumed(member, groups, slug, now, ref)
        return member

    def resume(
        self,
        group: Group,
        incident: str,
        size: int,
        count: int,
        now: Monotonic,
        *,
        age_s: float = 0.0,
    ) -> None:
        """Continue an incident that an earlier run opened `age_s` seconds ago and left open. Devices of the group
        that are unhealthy when they are first observed belong to it. It closes like any other, but not within the
        first window, so that all devices are observed before."""
        least = max(self.limits.least, self.limits.fraction * size)
        self.opened[group] = Incident(
            id=incident,
            kind=group[0],
            group=group[1],
            size=size,
            first_at=Monotonic(now - age_s),
            last_at=now,
            told=count,
            closes_below=max(1.0, least / 2),
            stays_until=Monotonic(now + self.limits.window_s),
        )

    def _resumed(
        self, member: _Member, groups: tuple[Group, ...], slug: Slug, now: Monotonic, ref: int
    ) -> None:
        for group in groups:
            incident = self.opened.get(group)
            if incident is not None and now <= incident.stays_until:
                self._join(member, incident, _Turn(slug, now, ref, groups))
                return

    def incident_of(self, slug: Slug) -> str:
        """The id of the open incident that explains the device's state; "" = none does."""
        member = self._members.get(slug)
        incident = member.incident if member is not None else None
        return incident.id if incident is not None and incident.closed_at is None else ""

    def forget(self, slug: Slug) -> None:
        """Remove a device."""
        member = self._members.pop(slug, None)
        if member is not None:
            self._recovered(member)
            self._regroup(member, ())

    def settle(self, now: Monotonic) -> list[News]:
        """The steps to publish now: incidents that opened, doubled since they were last published, or closed."""
        while self._turns and now - self._turns[0].at > self.limits.window_s:
            self._drop(self._turns.popleft())
        news = [*self._grown(), *self._closed(now)]
        while (group := self._worst()) is not None:
            news.append(self._open(group))
        return news

    def adopt(self, group: Group, incident: str) -> None:
        """Use the id that another replica gave to the incident of this group; "" = it has closed there."""
        opened = self.opened.get(group)
        if opened is not None and incident:
            opened.id = incident
        elif incident:
            self.given[group] = incident
        else:
            self.given.pop(group, None)

    def threshold(self, group: Group) -> float:
        """Number of unhealthy devices of the group that make an incident."""
        return max(self.limits.least, self.limits.fraction * self._sizes.get(group, 0))

    # -- one device -----------------------------------------------------------------------------

    def _regroup(self, member: _Member, groups: tuple[Group, ...]) -> None:
        for group in member.groups:
            self._sizes[group] -= 1
            if not self._sizes[group]:
                del self._sizes[group]
        for group in groups:
            self._sizes[group] = self._sizes.get(group, 0) + 1
        member.groups = groups

    def _turned_bad(self, member: _Member, turn: _Turn, *, again: bool = False) -> None:
        for group in turn.groups:
            incident = self.opened.get(group)
            if incident is not None:
                self._join(member, incident, turn)
                return
        member.turn = turn
        if not again:
            self._turns.append(turn)
        for group in turn.groups:
            self._recent.setdefault(group, {})[turn.slug] = turn

    def _recovered(self, member: _Member) -> None:
        if member.turn is not None:
            self._take_back(member)
        if member.incident is not None:
            member.incident.bad -= 1
            member.incident = None

    def _take_back(self, member: _Member) -> None:
        turn, member.turn = member.turn, None
        for group in turn.groups if turn is not None else ():
            recent = self._recent.get(group, {})
            if turn is not None and recent.get(turn.slug) is turn:
                del recent[turn.slug]
            if not recent:
                self._recent.pop(group, None)

    def _drop(self, turn: _Turn) -> None:
        member = self._members.get(turn.slug)
        if member is not None and member.turn is turn:
            self._take_back(member)

    def _join(self, member: _Member, incident: Incident, turn: _Turn) -> None:
        member.incident = incident
        incident.bad += 1
        incident.last_at = turn.at
        if turn.slug in incident.seen:
            return
        incident.seen.add(turn.slug)
        incident.count += 1
        group = (incident.kind, incident.group)
        incident.size = max(incident.size, self._sizes.get(group, 0), incident.count)
        if len(incident.members) < MAX_MEMBERS:
            incident.members.append(turn.slug)

    # -- incidents ------------------------------------------------------------------------------

    def _worst(self) -> Group | None:
        """The group that explains most of the unexplained changes: the one with the highest share of unhealthy
        devices, then the one with the highest number of them."""

        def rank(group: Group) -> tuple[float, int, int, str]:
            count = len(self._recent[group])
            return count / max(1, self._sizes.get(group, 0)), count, _RANK[group[0]], group[1]

        over = [group for group, recent in self._recent.items() if self._is_over(group, recent)]
        return max(over, key=rank, default=None)

    def _is_over(self, group: Group, recent: dict[Slug, _Turn]) -> bool:
        return group not in self.opened and len(recent) >= self.threshold(group)

    def _open(self, group: Group) -> News:
        self.number += 1
        turns = list(self._recent[group].values())
        incident = Incident(
            id=self.given.pop(group, "") or f"{self.name}-{self.number}",
            kind=group[0],
            group=group[1],
            size=self._sizes.get(group, 0),
            first_at=turns[0].at,
            last_at=turns[-1].at,
            # A few devices that stay unhealthy do not keep an incident open forever.
            closes_below=max(1.0, self.threshold(group) / 2),
        )
        for turn in turns:
            member = self._members[turn.slug]
            self._take_back(member)
            self._join(member, incident, turn)
        refs = [turn.ref for turn in turns]
        incident.subsumes = refs[:MAX_MEMBERS]
        incident.told = incident.count
        self.opened[group] = incident
        return News(IncidentStep.OPENED, incident, refs)

    def _grown(self) -> Iterable[News]:
        for incident in self.opened.values():
            if incident.count >= 2 * incident.told:
                incident.told = incident.count
                yield News(IncidentStep.UPDATED, incident)

    def _closed(self, now: Monotonic) -> Iterable[News]:
        for group, incident in list(self.opened.items()):
            if incident.bad < incident.closes_below and now >= incident.stays_until:
                del self.opened[group]
                incident.closed_at = now
                incident.seen.clear()
                yield News(IncidentStep.CLOSED, incident)


SITE_LABEL: Final = "site"
GATEWAY_LABEL: Final = "gateway"


def groups_of(record: DeviceRecord, node: str, gateway: str) -> tuple[Group, ...]:
    if record.presence is not Presence.PRESENT:
        return ()
    device = record.device
    named = (
        (GroupKind.GATEWAY, device.labels.get(GATEWAY_LABEL, "") or gateway),
        (GroupKind.HOST, node),
        (GroupKind.SITE, device.labels.get(SITE_LABEL, "")),
        (GroupKind.CLASS, device.agent_class),
    )
    return tuple((kind, name) for kind, name in named if name)
