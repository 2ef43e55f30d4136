"""Incidents: devices with something in common that became unhealthy together (`core.incidents` decides)."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core.incidents import (
    TROUBLE,
    Correlator,
    Group,
    GroupKind,
    Incident,
    IncidentLimits,
    IncidentStep,
    News,
    groups_of,
)
from nomad_watchdog.core.verdict import Evidence
from nomad_watchdog.fleet.events import FleetEvents
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    AgentState,
    DeviceRecord,
    Limits,
    PlacementState,
    Verdict,
    VerdictState,
)

MAX_CLOSED: Final = 100
"""Closed incidents that are still listed."""
_OPENED: Final = re.compile(
    rf"(\d{{1,9}}) of (\d{{1,9}}) devices of ({'|'.join(GroupKind)}) (.+?)(?:; no agent runs: .+)?",
    re.DOTALL,
)
"""The text of an event that opens an incident."""


@dataclass(slots=True)
class _Device:
    """What is remembered of a device."""

    groups: tuple[Group, ...] = ()
    inputs: tuple[object, ...] = ()
    """What the groups were derived from."""
    node: str = ""
    gateway: str = ""
    cause: str = ""
    """Why it has no running agent, in the scheduler's words; "" = it has one, or the reason is not known."""


class IncidentTracker:
    """The incidents of one fleet, and their events."""

    def __init__(
        self,
        events: FleetEvents,
        limits: Limits,
        clock: Clock,
        pause_id: Callable[[DeviceRecord], str],
    ) -> None:
        """`pause_id`: the ID of the pause that covers a device, "" = none. A paused device is part of no
        incident."""
        self._events = events
        self._clock = clock
        self._pause_id = pause_id
        self._correlator = Correlator(_limits(limits), f"{events.own.origin}:incident")
        self._closed: deque[Incident] = deque(maxlen=MAX_CLOSED)
        self._devices: dict[Slug, _Device] = {}

    def configure(self, limits: Limits) -> None:
        """Apply these limits from now on."""
        self._correlator.limits = _limits(limits)

    # -- devices --------------------------------------------------------------------------------

    def observe(self, record: DeviceRecord, evidence: Evidence, state: VerdictState) -> None:
        """Update the groups of a device. Cheap when none has changed."""
        known, placement = self._of(record.slug), evidence.placement
        gateway = evidence.report.gateway if evidence.report is not None else ""
        node, known.cause = "", evidence.obstacle
        if placement is not None:
            runs = placement.state is PlacementState.RUNNING
            node, known.cause = placement.node, "" if runs else placement.reason
        gateway = gateway or known.gateway
        inputs = (record.device, record.presence, node, gateway)
        if known.inputs == inputs:
            return
        # A placement that is gone with its host still belongs to that host.
        known.node, known.gateway = node or known.node, gateway
        known.inputs, known.groups = inputs, groups_of(record, known.node, gateway)
        self._correlator.observe(
            record.slug,
            known.groups,
            bad=state in TROUBLE and not self._pause_id(record),
            now=self._clock.monotonic(),
            ref=self._events.own.last_seq,
        )

    def verdict_changed(
        self, record: DeviceRecord, was: VerdictState | None, judged: Verdict, evidence: Evidence
    ) -> str:
        """A device has another verdict; the ID of the incident that it belongs to, or did before; "" = none."""
        before = self.of(record.slug) if was in TROUBLE else ""
        has_room = self._events.limits.has_room(record.slug)
        incident = self._correlator.observe(
            record.slug,
            self._of(record.slug).groups,
            bad=judged.state in TROUBLE and not self._pause_id(record),
            now=self._clock.monotonic(),
            ref=self._events.own.last_seq + 1 if has_room else 0,
            only=_cause(judged, evidence),
        )
        return incident or before

    def of(self, slug: Slug) -> str:
        """The ID of the open incident that a device belongs to; "" = none."""
        return self._correlator.incident_of(slug)

    def forget(self, slug: Slug) -> None:
        """The device's record is gone."""
        self._devices.pop(slug, None)
        self._correlator.forget(slug)

    def _of(self, slug: Slug) -> _Device:
        known = self._devices.get(slug)
        if known is None:
            known = self._devices[slug] = _Device()
        return known

    # -- opening and closing --------------------------------------------------------------------

    def tick(self) -> None:
        """Open and close incidents; call it every few seconds."""
        # Incident IDs use event numbers, so that none is used twice: each incident has at least one event.
        self._correlator.number = max(self._correlator.number, self._events.own.last_seq)
        for news in self._correlator.settle(self._clock.monotonic()):
            self._publish(news)

    def _publish(self, news: News) -> None:
        incident = news.incident
        if news.step is IncidentStep.CLOSED:
            self._closed.append(incident)
        if news.marks:
            self._events.own.mark(news.marks, incident.id)
        origin = self._events.own.origin
        text = f"{incident.count} of {incident.size} devices of {incident.kind} {incident.group}"
        data: dict[str, object] = {
            "kind": incident.kind.value,
            "group": incident.group,
            "count": incident.count,
            "bad": incident.bad,
        }
        if news.step is IncidentStep.OPENED:
            data["members"] = list(incident.members[:20])
            data["subsumes"] = [f"{origin}:{ref}" for ref in incident.subsumes[:20] if ref]
            data["subsumed"] = len(news.marks)
        if news.step is IncidentStep.CLOSED:
            text += f"; {incident.bad} are still unhealthy"
        elif reason := self.reason(incident):
            text += f"; no agent runs: {reason}"
            data["reason"] = reason
        self._events.note_fleet(f"incident.{news.step.value}", text, data, incident.id)

    def reason(self, incident: Incident) -> str:
        """Why most devices of an incident have no running agent, in the scheduler's words; "" = they have one, or
        the reasons differ."""
        causes = Counter(self._of(slug).cause for slug in incident.members)
        if not causes:
            return ""
        ((most, count),) = causes.most_common(1)
        return most if 2 * count > len(incident.members) else ""

    def restore(self, left_open: Mapping[str, tuple[str, float]]) -> None:
        """Continue with incidents that were open when the last run ended: ID → text and Unix seconds of the event
        that opened it. Devices that are still unhealthy remain part of it. An unreadable one is closed."""
        for incident, (text, at) in left_open.items():
            match = _OPENED.fullmatch(text)
            if match is None:
                why = f"{text}; the control plane was restarted and judges anew"
                self._events.note_fleet("incident.closed", why, incident=incident)
                continue
            count, size, kind, group = match.groups()
            age_s = max(0.0, self._clock.wall() - at)
            key = GroupKind(kind), group
            now = self._clock.monotonic()
            self._correlator.resume(key, incident, int(size), int(count), now, age_s=age_s)

    def adopt(self, kind: str, group: str, incident: str) -> None:
        """Use the incident ID that another replica has published for this group; "" = it has closed it."""
        with suppress(ValueError):  # a newer version, with more kinds
            self._correlator.adopt((GroupKind(kind), group), incident)

    def close_foreign(self, kind: str, group: str, incident: str, text: str) -> None:
        """Close an incident that another replica opened, unless the group is unhealthy here, too."""
        if any((str(one[0]), one[1]) == (kind, group) for one in self._correlator.opened):
            return
        text += "; the replica that is responsible now does not observe it"
        data = {"kind": kind, "group": group}
        self._events.note_fleet("incident.closed", text, data, incident)

    # -- views ----------------------------------------------------------------------------------

    def open_by_kind(self) -> dict[str, int]:
        """Number of open incidents by kind of group; every kind is present."""
        counts = Counter(kind for kind, _ in self._correlator.opened)
        return {kind.value: counts[kind] for kind in GroupKind}

    def opened(self) -> list[Incident]:
        """The open incidents."""
        return list(self._correlator.opened.values())

    def all(self) -> list[Incident]:
        """Open incidents, then the last closed ones, newest first."""
        by_age = sorted(self.opened(), key=lambda incident: incident.first_at, reverse=True)
        return [*by_age, *reversed(self._closed)]

    def serialize(
        self, incident: Incident, device_id_of: Callable[[Slug], str]
    ) -> dict[str, object]:
        """As JSON; ages in seconds."""
        now, origin = self._clock.monotonic(), self._events.own.origin
        closed = incident.closed_at
        return {
            "id": incident.id,
            "kind": incident.kind.value,
            "group": incident.group,
            "open": closed is None,
            "size": incident.size,
            "count": incident.count,
            "bad": incident.bad,
            "reason": self.reason(incident) if closed is None else "",
            "first_age_s": round(now - incident.first_at, 1),
            "last_age_s": round(now - incident.last_at, 1),
            "closed_age_s": None if closed is None else round(now - closed, 1),
            "members": [device_id_of(slug) for slug in incident.members],
            "subsumes": [f"{origin}:{ref}" for ref in incident.subsumes if ref],
        }

    def status(self) -> dict[str, object]:
        """The number of open incidents, for the status."""
        return {"open": len(self._correlator.opened), **self.open_by_kind()}


def _cause(judged: Verdict, evidence: Evidence) -> GroupKind | None:
    """The group that causes a probe that cannot be made: the gateway if it is dead, else the host. None = not
    known."""
    report = evidence.report
    if (
        report is None
        or report.state is not AgentState.UNABLE
        or judged.state is not VerdictState.UNWATCHED
        or not judged.ready
    ):
        return None
    return GroupKind.GATEWAY if report.gateway_dead else GroupKind.HOST


def _limits(limits: Limits) -> IncidentLimits:
    return IncidentLimits(limits.incident_min, limits.incident_fraction, limits.incident_window_s)
