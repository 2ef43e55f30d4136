"""What is told of verdicts: events with their evidence, incidents, and the grace that starts get.

Stands between `fleet`, which judges, and the pure parts that look at many devices at once.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import repair_events
from nomad_watchdog.core.incidents import (
    TROUBLE,
    Correlator,
    Group,
    GroupKind,
    Incident,
    IncidentLimits,
    News,
    Step,
    groups_of,
)
from nomad_watchdog.core.startup_grace import Grace, GraceLimits, StartTimes
from nomad_watchdog.core.verdict import Evidence
from nomad_watchdog.events.device_limits import DeviceLimits
from nomad_watchdog.events.log import EventLog
from nomad_watchdog.fleet.serializers import shown_repairs
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    AgentState,
    DeviceRecord,
    Limits,
    Monotonic,
    PlacementState,
    Repairs,
    Verdict,
)
from nomad_watchdog.model import VerdictState as State

MAX_CLOSED: Final = 100
"""Closed incidents that are still shown."""
MAX_ATTEMPTS: Final = 4
"""Attempts of a repair that an event has as evidence: an event is kept for long, and the agent chooses its size."""
_OPENED: Final = re.compile(
    rf"(\d{{1,9}}) of (\d{{1,9}}) devices of ({'|'.join(GroupKind)}) (.+?)(?:; no agent runs: .+)?",
    re.DOTALL,
)
"""The text of an event that opens an incident."""


@dataclass(frozen=True, slots=True)
class Change:
    """A verdict that is new, and the one that it follows."""

    record: DeviceRecord
    judged: Verdict
    evidence: Evidence
    was: State | None
    """None: this is the first look at the device."""
    was_for_s: float
    """How long the former state lasted, seconds."""
    told: bool = False
    """An earlier run told this verdict, and it has lasted since: a restart of ours is no news."""


@dataclass(slots=True)
class _Known:
    """What is kept of a device between two looks."""

    groups: tuple[Group, ...] = ()
    inputs: tuple[object, ...] = ()
    node: str = ""
    gateway: str = ""
    cause: str = ""
    """Why no agent of it runs, in the scheduler's words; "" = one does, or that is not known."""
    placed_epoch: int = -1
    placed_at: Monotonic | None = None
    is_measured: bool = True


@dataclass(slots=True)
class EventRecorder:
    """The events, incidents and start times of one fleet."""

    history: EventLog
    limits: Limits
    clock: Clock
    correlator: Correlator = field(init=False)
    allowance: DeviceLimits = field(init=False)
    starts: StartTimes = field(init=False)
    closed: deque[Incident] = field(default_factory=lambda: deque(maxlen=MAX_CLOSED))
    status_of_store: Callable[[], dict[str, object]] = lambda: {
        "stored": False,
        "reason": "events are kept in memory only: no file was opened",
    }
    paused: Callable[[DeviceRecord], str] = lambda _record: ""
    """The id of the pause that covers a device; planned work is told, and makes no incident."""
    _stored: bool = False
    _known: dict[Slug, _Known] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.starts = StartTimes(_grace_limits(self.limits))
        self.allowance = DeviceLimits(self.history, self.clock)
        self.correlator = Correlator(
            _incident_limits(self.limits), f"{self.history.origin}:incident"
        )

    def go_by(self, limits: Limits) -> None:
        """Judge starts and incidents by these limits from now on."""
        self.limits = limits
        self.starts.go_by(_grace_limits(limits))
        self.correlator.limits = _incident_limits(limits)

    # -- starts ---------------------------------------------------------------------------------

    def placed(self, slug: Slug, epoch: int) -> None:
        """An agent has just been dispatched at this epoch."""
        known = self._of(slug)
        known.placed_epoch, known.placed_at = epoch, self.clock.monotonic()
        known.is_measured = False

    def placed_at(self, record: DeviceRecord) -> Monotonic | None:
        """When the agent of the record's epoch was dispatched; None when it was not seen."""
        known = self._known.get(record.slug)
        return known.placed_at if known and known.placed_epoch == record.epoch else None

    def ready(self, record: DeviceRecord) -> None:
        """The agent of the record's epoch says that it is ready: the first time it is a measurement."""
        known = self._known.get(record.slug)
        if known is None or known.is_measured or known.placed_epoch != record.epoch:
            return
        known.is_measured = True
        now = self.clock.monotonic()
        if known.placed_at is not None:
            self.starts.add(record.device.agent_class, max(0.0, now - known.placed_at), now)

    def grace(self, record: DeviceRecord) -> Grace:
        """How long the start of this device's agent may take."""
        return self.starts.grace(record.device.agent_class)

    # -- verdicts -------------------------------------------------------------------------------

    def look(self, record: DeviceRecord, evidence: Evidence, state: State) -> None:
        """Keep the groups of a device current. Cheap when nothing moved."""
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
        # A placement that has gone with its host is still of that host.
        known.node, known.gateway = node or known.node, gateway
        known.inputs, known.groups = inputs, groups_of(record, known.node, gateway)
        self.correlator.observe(
            record.slug,
            known.groups,
            bad=state in TROUBLE and not self.paused(record),
            now=self.clock.monotonic(),
            ref=self.history.last_seq,
        )

    def changed(self, change: Change) -> None:
        """A device has another state: an event, and perhaps a part of an incident."""
        record, judged = change.record, change.judged
        paused = self.paused(record)
        known = self._of(record.slug)
        now = self.clock.monotonic()
        was_bad = change.was in TROUBLE
        before = self.correlator.incident_of(record.slug) if was_bad else ""
        incident = self.correlator.observe(
            record.slug,
            known.groups,
            bad=judged.state in TROUBLE and not paused,
            now=now,
            ref=self.history.last_seq + 1 if self.allowance.has_room(record.slug) else 0,
            only=_cause(change),
        )
        if change.told or (change.was is None and judged.state is State.STARTING):
            return
        data = {
            "was": change.was.value if change.was is not None else None,
            "was_for_s": round(change.was_for_s, 1),
            "evidence": self._shown(change.evidence, now),
        }
        if paused:
            data["paused"] = paused
        self.allowance.add(
            at=self.clock.wall(),
            kind=f"verdict.{judged.state.value}",
            device_id=record.device.id,
            slug=record.slug,
            text=judged.reason,
            data=data,
            incident=incident or before,
        )

    def repaired(self, record: DeviceRecord, before: Repairs | None, after: Repairs | None) -> None:
        """A report has come: each repair that has ended since the one before is an event."""
        for attempt in repair_events.news(before, after):
            self.allowance.add(
                at=self.clock.wall(),
                kind=f"repair.{attempt.outcome.replace(' ', '_')}",
                device_id=record.device.id,
                slug=record.slug,
                text=f"{attempt.step}: {attempt.reason or attempt.outcome}",
                data={"step": attempt.step, "number": attempt.number, "age_s": attempt.age_s},
                incident=self.correlator.incident_of(record.slug),
            )

    def forget(self, slug: Slug) -> None:
        """The device's record is gone."""
        self._known.pop(slug, None)
        self.correlator.forget(slug)

    def settle(self) -> None:
        """Open and close incidents; to be called every few seconds."""
        self.allowance.settle()
        # Numbered as events are, so that no id comes twice: each incident has at least one event.
        self.correlator.number = max(self.correlator.number, self.history.last_seq)
        for news in self.correlator.settle(self.clock.monotonic()):
            self._tell(news)
        store = self.status_of_store()
        if store["stored"] is not self._stored:
            self._stored = bool(store["stored"])
            self.history.add(
                at=self.clock.wall(),
                kind="events.stored" if self._stored else "events.degraded",
                device_id="",
                slug=Slug(""),
                text=str(store["reason"]) or "events are stored",
                data={},
            )

    def reason(self, incident: Incident) -> str:
        """Why no agent runs for most of the devices of an incident, in the scheduler's words; "" = agents run,
        or the reasons differ."""
        causes = Counter(self._of(slug).cause for slug in incident.members)
        if not causes:
            return ""
        ((most, count),) = causes.most_common(1)
        return most if 2 * count > len(incident.members) else ""

    def _tell(self, news: News) -> None:
        incident = news.incident
        if news.step is Step.CLOSED:
            self.closed.append(incident)
        if news.marks:
            self.history.mark(news.marks, incident.id)
        origin = self.history.origin
        text = f"{incident.count} of {incident.size} devices of {incident.kind} {incident.group}"
        data: dict[str, object] = {
            "kind": incident.kind.value,
            "group": incident.group,
            "count": incident.count,
            "bad": incident.bad,
        }
        if news.step is Step.OPENED:
            data["members"] = list(incident.members[:20])
            data["subsumes"] = [f"{origin}:{ref}" for ref in incident.subsumes[:20] if ref]
            data["subsumed"] = len(news.marks)
        if news.step is Step.CLOSED:
            text += f"; {incident.bad} are still not well"
        elif reason := self.reason(incident):
            text += f"; no agent runs: {reason}"
            data["reason"] = reason
        self.history.add(
            at=self.clock.wall(),
            kind=f"incident.{news.step.value}",
            device_id="",
            slug=Slug(""),
            text=text,
            data=data,
            incident=incident.id,
        )

    def _of(self, slug: Slug) -> _Known:
        known = self._known.get(slug)
        if known is None:
            known = self._known[slug] = _Known()
        return known

    # -- what is shown --------------------------------------------------------------------------

    def follow(
        self,
        status_of_store: Callable[[], dict[str, object]],
        left_open: Mapping[str, tuple[str, float]],
    ) -> None:
        """The history has a store. `left_open`: id → text and time (unix seconds) of the event that opened
        an incident, of those that were open when the last run ended. They go on, with those of their devices that are still bad; one that can't be understood ends."""
        self.status_of_store = status_of_store
        self._stored = bool(status_of_store()["stored"]) or self._stored
        for incident, (text, at) in left_open.items():
            if (said := _OPENED.fullmatch(text)) is not None:
                count, size, kind, group = said.groups()
                self.correlator.resume(
                    (GroupKind(kind), group),
                    incident,
                    int(size),
                    int(count),
                    self.clock.monotonic(),
                    age_s=max(0.0, self.clock.wall() - at),
                )
                continue
            self.history.add(
                at=self.clock.wall(),
                kind="incident.closed",
                device_id="",
                slug=Slug(""),
                text=f"{text}; the control plane was restarted, and looks anew",
                data={},
                incident=incident,
            )

    def adopt(self, kind: str, group: str, incident: str) -> None:
        """Call the incident of this group as another replica told it; "" = it told that it is over."""
        with suppress(ValueError):  # of a newer version, which knows more kinds
            self.correlator.adopt((GroupKind(kind), group), incident)

    def end(self, kind: str, group: str, incident: str, text: str) -> None:
        """Tell that an incident is over which another replica opened, unless it goes on here."""
        if any((str(one[0]), one[1]) == (kind, group) for one in self.correlator.opened):
            return
        self.history.add(
            at=self.clock.wall(),
            kind="incident.closed",
            device_id="",
            slug=Slug(""),
            text=f"{text}; another replica tells now, and does not see it",
            data={"kind": kind, "group": group},
            incident=incident,
        )

    def open_by_kind(self) -> dict[str, int]:
        """Open incidents by kind of group; every kind is there."""
        counts = Counter(kind for kind, _ in self.correlator.opened)
        return {kind.value: counts[kind] for kind in GroupKind}

    def incidents(self) -> list[Incident]:
        """The open ones, then the last closed ones, newest first."""
        opened = sorted(self.correlator.opened.values(), key=lambda i: i.first_at, reverse=True)
        return [*opened, *reversed(self.closed)]

    def shown_incident(
        self, incident: Incident, device_of: Callable[[Slug], str]
    ) -> dict[str, object]:
        """For JSON; ages in seconds."""
        now, origin = self.clock.monotonic(), self.history.origin
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
            "members": [device_of(slug) for slug in incident.members],
            "subsumes": [f"{origin}:{ref}" for ref in incident.subsumes if ref],
        }

    def explain(self, record: DeviceRecord) -> dict[str, object]:
        """The grace in force for a device, and the incident that explains its state."""
        grace = self.grace(record)
        placed_at = self.placed_at(record)
        return {
            "grace": {
                "seconds": round(grace.seconds, 1),
                "samples": grace.samples,
                "source": grace.source,
                "dispatched_s_ago": None
                if placed_at is None
                else round(self.clock.monotonic() - placed_at, 1),
            },
            "incident": self.correlator.incident_of(record.slug) or None,
        }

    def status(self) -> dict[str, object]:
        """Our part of the status."""
        return {
            "incidents": {"open": len(self.correlator.opened), **self.open_by_kind()},
            "events": self.status_of_store(),
        }

    def _shown(self, evidence: Evidence, now: Monotonic) -> dict[str, object]:
        """The inputs that decided, short."""
        placement, report, health = evidence.placement, evidence.report, evidence.health
        return {
            "placement": placement.state.value if placement is not None else None,
            "node": placement.node if placement is not None else "",
            "report": None
            if report is None
            else {
                "age_s": round(now - report.received_at, 1),
                "state": report.state.value,
                "ready": report.ready,
                "was_ready": report.was_ready,
                "misses": report.misses,
                "confirmed": report.confirmed,
                **shown_repairs(report.repairs, MAX_ATTEMPTS),
                **({"gateway_dead": report.gateway} if report.gateway_dead else {}),
            },
            "consul": health.status if health is not None else None,
            "heartbeat_age_s": None
            if evidence.beat_at is None
            else round(now - evidence.beat_at, 1),
            "waited_s": round(now - evidence.waiting_since, 1),
            "grace_s": None if evidence.grace_s is None else round(evidence.grace_s, 1),
        }


def _cause(change: Change) -> GroupKind | None:
    """Whose trouble it is, whatever device it is about, if the agent can't ask: its gateway's if that is dead, else
    its host's. None = that is not known."""
    report = change.evidence.report
    if (
        report is None
        or report.state is not AgentState.UNABLE
        or change.judged.state is not State.UNWATCHED
        or not change.judged.ready
    ):
        return None
    return GroupKind.GATEWAY if report.gateway_dead else GroupKind.HOST


def _grace_limits(limits: Limits) -> GraceLimits:
    return GraceLimits(
        limits.startup_grace_s, limits.startup_grace_min_s, limits.startup_grace_max_s
    )


def _incident_limits(limits: Limits) -> IncidentLimits:
    return IncidentLimits(limits.incident_min, limits.incident_fraction, limits.incident_window_s)
