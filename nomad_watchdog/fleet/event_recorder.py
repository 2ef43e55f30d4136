"""Events of changed verdicts and of repairs, with their evidence, and how long starts take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import repair_events
from nomad_watchdog.core.startup_grace import Grace, GraceLimits, StartTimes
from nomad_watchdog.core.verdict import Evidence
from nomad_watchdog.fleet.events import FleetEvents
from nomad_watchdog.fleet.incidents import IncidentTracker
from nomad_watchdog.fleet.serializers import repairs_json
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    DeviceRecord,
    Limits,
    Monotonic,
    Repairs,
    Verdict,
    VerdictState,
)

MAX_ATTEMPTS: Final = 4
"""Repair attempts that an event carries as evidence: events are kept for long, and the agent chooses their size."""


@dataclass(frozen=True, slots=True)
class Change:
    """A new verdict, and the one before it."""

    record: DeviceRecord
    judged: Verdict
    evidence: Evidence
    was: VerdictState | None
    """None: the device is judged for the first time."""
    was_for_s: float
    """How long the former state lasted, seconds."""
    is_published: bool = False
    """An earlier run published this verdict, and it has lasted since: a restart is not an event."""


@dataclass(slots=True)
class _Start:
    """The dispatch of an agent."""

    epoch: int
    at: Monotonic
    is_measured: bool = False


class EventRecorder:
    """Records what happens to devices and agents."""

    def __init__(
        self,
        events: FleetEvents,
        incidents: IncidentTracker,
        limits: Limits,
        clock: Clock,
        pause_id: Callable[[DeviceRecord], str],
    ) -> None:
        """`pause_id`: the ID of the pause that covers a device, "" = none."""
        self._events = events
        self.incidents = incidents
        self._clock = clock
        self._pause_id = pause_id
        self._start_times = StartTimes(_grace_limits(limits))
        self._starts: dict[Slug, _Start] = {}
        self._status_of_store: Callable[[], dict[str, object]] = _not_stored
        self._is_stored = False

    def configure(self, limits: Limits) -> None:
        """Apply these limits from now on."""
        self._start_times.go_by(_grace_limits(limits))
        self.incidents.configure(limits)

    def use_store(
        self,
        status: Callable[[], dict[str, object]],
        left_open: Mapping[str, tuple[str, float]],
    ) -> None:
        """The event log has a store. `left_open`: as of `IncidentTracker.restore`."""
        self._status_of_store = status
        self._is_stored = bool(status()["stored"]) or self._is_stored
        self.incidents.restore(left_open)

    # -- starts ---------------------------------------------------------------------------------

    def dispatched(self, slug: Slug, epoch: int) -> None:
        """An agent has just been dispatched with this epoch."""
        self._starts[slug] = _Start(epoch, self._clock.monotonic())

    def dispatched_at(self, record: DeviceRecord) -> Monotonic | None:
        """When the agent of the record's epoch was dispatched; None when this process did not do it."""
        start = self._starts.get(record.slug)
        return start.at if start is not None and start.epoch == record.epoch else None

    def ready(self, record: DeviceRecord) -> None:
        """The agent of the record's epoch reports that it is ready. The first time, its start is measured."""
        start = self._starts.get(record.slug)
        if start is None or start.is_measured or start.epoch != record.epoch:
            return
        start.is_measured = True
        now = self._clock.monotonic()
        self._start_times.add(record.device.agent_class, max(0.0, now - start.at), now)

    def grace(self, record: DeviceRecord) -> Grace:
        """How long the start of this device's agent may take."""
        return self._start_times.grace(record.device.agent_class)

    # -- verdicts -------------------------------------------------------------------------------

    def verdict_changed(self, change: Change) -> None:
        """A device has another verdict: an event, and perhaps part of an incident."""
        record, judged, was = change.record, change.judged, change.was
        incident = self.incidents.verdict_changed(record, was, judged, change.evidence)
        if change.is_published or (was is None and judged.state is VerdictState.STARTING):
            return
        data: dict[str, object] = {
            "was": was.value if was is not None else None,
            "was_for_s": round(change.was_for_s, 1),
            "evidence": _evidence_json(change.evidence, self._clock.monotonic()),
        }
        if paused := self._pause_id(record):
            data["paused"] = paused
        self._add(record, f"verdict.{judged.state.value}", judged.reason, data, incident)

    def repaired(self, record: DeviceRecord, before: Repairs | None, after: Repairs | None) -> None:
        """A report has arrived: each repair that has ended since the last one is an event."""
        for attempt in repair_events.news(before, after):
            self._add(
                record,
                f"repair.{attempt.outcome.replace(' ', '_')}",
                f"{attempt.step}: {attempt.reason or attempt.outcome}",
                {"step": attempt.step, "number": attempt.number, "age_s": attempt.age_s},
                self.incidents.of(record.slug),
            )

    def _add(
        self,
        record: DeviceRecord,
        kind: str,
        text: str,
        data: Mapping[str, object],
        incident: str,
    ) -> None:
        self._events.limits.add(
            at=self._clock.wall(),
            kind=kind,
            device_id=record.device.id,
            slug=record.slug,
            text=text,
            data=data,
            incident=incident,
        )

    def forget(self, slug: Slug) -> None:
        """The device's record is gone."""
        self._starts.pop(slug, None)
        self.incidents.forget(slug)

    def tick(self) -> None:
        """Publish events that waited for room, open and close incidents; call it every few seconds."""
        self._events.limits.settle()
        self.incidents.tick()
        store = self._status_of_store()
        if store["stored"] is not self._is_stored:
            self._is_stored = bool(store["stored"])
            kind = "events.stored" if self._is_stored else "events.degraded"
            self._events.note_fleet(kind, str(store["reason"]) or "events are stored")

    # -- views ----------------------------------------------------------------------------------

    def explain(self, record: DeviceRecord) -> dict[str, object]:
        """The start-up grace in force for a device, and the incident that explains its state."""
        grace = self.grace(record)
        at = self.dispatched_at(record)
        return {
            "grace": {
                "seconds": round(grace.seconds, 1),
                "samples": grace.samples,
                "source": grace.source,
                "dispatched_s_ago": None if at is None else round(self._clock.monotonic() - at, 1),
            },
            "incident": self.incidents.of(record.slug) or None,
        }

    def status_of_store(self) -> dict[str, object]:
        """Whether events are stored, and if not, why."""
        return self._status_of_store()

    def status(self) -> dict[str, object]:
        """The part of the status about events and incidents."""
        return {"incidents": self.incidents.status(), "events": self._status_of_store()}


def _not_stored() -> dict[str, object]:
    return {"stored": False, "reason": "events are kept in memory only: no file was opened"}


def _evidence_json(evidence: Evidence, now: Monotonic) -> dict[str, object]:
    """The inputs of a verdict, short."""
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
            **repairs_json(report.repairs, MAX_ATTEMPTS),
            **({"gateway_dead": report.gateway} if report.gateway_dead else {}),
        },
        "consul": health.status if health is not None else None,
        "heartbeat_age_s": None if evidence.beat_at is None else round(now - evidence.beat_at, 1),
        "waited_s": round(now - evidence.waiting_since, 1),
        "grace_s": None if evidence.grace_s is None else round(evidence.grace_s, 1),
    }


def _grace_limits(limits: Limits) -> GraceLimits:
    return GraceLimits(
        limits.startup_grace_s, limits.startup_grace_min_s, limits.startup_grace_max_s
    )
