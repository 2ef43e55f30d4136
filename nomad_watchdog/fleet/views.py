"""What `status`, `explain` and `plan` report of a fleet. Reads only: no view judges, emits or stores anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nomad_watchdog.clock import Clock
from nomad_watchdog.fleet.event_recorder import EventRecorder
from nomad_watchdog.fleet.events import FleetEvents
from nomad_watchdog.fleet.presence import PresenceView
from nomad_watchdog.fleet.readiness import FleetReadiness
from nomad_watchdog.fleet.reconcile_loop import NoLoop, ReconcileLoop
from nomad_watchdog.fleet.records import RecordCache
from nomad_watchdog.fleet.serializers import (
    desired_json,
    health_json,
    placement_json,
    report_json,
)
from nomad_watchdog.fleet.verdicts import VerdictTracker
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    DeviceRecord,
    Health,
    Placement,
    PlacementState,
    Presence,
    Report,
    Verdict,
)

StatusPart = Callable[[], dict[str, object]]
ExplainPart = Callable[[Slug], dict[str, object]]


class Components(Protocol):
    """The components that the views read."""

    clock: Clock
    readiness: FleetReadiness
    records: RecordCache
    placements: dict[Slug, tuple[Placement, ...]]
    presence: PresenceView
    verdicts: VerdictTracker
    recorder: EventRecorder
    events: FleetEvents


@dataclass(frozen=True, slots=True)
class DeviceView:
    """What is known of one device."""

    record: DeviceRecord
    verdict: Verdict
    since_s: float
    """Age of the verdict's state."""
    placement: Placement | None
    report: Report | None
    health: Health | None


class FleetViews:
    """The views of one fleet. Components add their own parts."""

    def __init__(self, fleet: Components) -> None:
        self._fleet = fleet
        self._loop: ReconcileLoop = NoLoop()
        self._status_parts: list[StatusPart] = [fleet.recorder.status]
        self._explain_parts: list[ExplainPart] = [fleet.presence.explain]

    def attach(self, loop: ReconcileLoop) -> None:
        """Take the plan from this loop from now on."""
        self._loop = loop

    def add_status(self, part: StatusPart) -> None:
        """Add the fields that `part` returns to the status."""
        self._status_parts.append(part)

    def add_explain(self, part: ExplainPart) -> None:
        """Add the fields that `part` returns to the explanation of a device."""
        self._explain_parts.append(part)

    def device(self, slug: Slug) -> DeviceView | None:
        """One device as last judged; None = unknown."""
        fleet = self._fleet
        record = fleet.records.get(slug)
        if record is None:
            return None
        verdict, since = fleet.verdicts.last(slug)
        found = fleet.placements.get(slug, ())
        live = (one for one in found if one.state is not PlacementState.DEAD)
        current = next((one for one in live if one.epoch == record.epoch), None)
        return DeviceView(
            record=record,
            verdict=verdict,
            since_s=fleet.clock.monotonic() - since,
            placement=current or next(iter(found), None),
            report=fleet.verdicts.report_of_agent(record),
            health=fleet.verdicts.health_of(record),
        )

    def status(self) -> dict[str, object]:
        """A summary for the API, the page and the CLI."""
        fleet = self._fleet
        status: dict[str, object] = {
            "ready": fleet.readiness.ready,
            "reason": fleet.readiness.reason,
            "devices": sum(r.presence is Presence.PRESENT for r in fleet.records.values()),
            "verdicts": {state.value: n for state, n in fleet.verdicts.counts().items()},
            "placements": sum(
                p.state is not PlacementState.DEAD
                for found in fleet.placements.values()
                for p in found
            ),
            "registry_index": fleet.records.index,
            "unheard": {why.value: n for why, n in fleet.verdicts.unheard().items()},
            "unlisted": fleet.verdicts.totals.unlisted,
            "paused": len(fleet.presence.paused()),
            "pauses_problem": fleet.presence.pauses.problem,
            "flapping": fleet.presence.heartbeats.flapping(fleet.clock.monotonic()),
        }
        for part in self._status_parts:
            status.update(part())
        return status

    def explain(self, slug: Slug) -> dict[str, object]:
        """Why the device has its verdict: decisions, inputs, IDs, checks and what happens next; empty for an
        unknown device."""
        fleet, view = self._fleet, self.device(slug)
        if view is None:
            return {}
        record, now = view.record, fleet.clock.monotonic()
        beat = fleet.presence.heartbeats.beats.get(slug)
        return {
            "id": record.device.id,
            "slug": slug,
            "verdict": view.verdict.state.value,
            "reason": view.verdict.reason,
            "since_s": round(view.since_s, 1),
            "desired": desired_json(record),
            "observed": [placement_json(one) for one in fleet.placements.get(slug, ())],
            "report": report_json(fleet.verdicts.last_report(slug), now),
            "condition": self.condition_json(record),
            "consul": health_json(view.health),
            "heartbeat_age_s": None if beat is None else round(now - beat, 1),
            "events": [event.shown() for event in fleet.events.all.of_device(slug)],
            **fleet.recorder.explain(record),
            **self.explain_parts(slug),
        }

    def explain_parts(self, slug: Slug) -> dict[str, object]:
        """The fields that components add to the explanation of a device, which may be unknown."""
        return {name: value for part in self._explain_parts for name, value in part(slug).items()}

    def plan(self) -> dict[str, object]:
        """What the next pass would do."""
        return self._loop.plan()

    def condition_json(self, record: DeviceRecord) -> dict[str, object] | None:
        """What is wrong with a device, and whether that is stored in the registry; None = nothing."""
        found = self._fleet.verdicts.condition(record)
        if found is None:
            return None
        return {
            "state": found.state.value,
            "since": found.since,
            "age_s": round(max(0.0, self._fleet.clock.wall() - found.since), 1),
            "reason": found.reason,
            "misses": found.misses,
            "stored": found == record.condition,
        }
