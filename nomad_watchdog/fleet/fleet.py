"""What the control plane knows of each device: record, placements, presence, reports, verdict and events.

Everything but the records is in memory only, and is collected again after a restart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from nomad_watchdog.clock import Clock
from nomad_watchdog.events.log import EventLog
from nomad_watchdog.fleet.agent_readiness import (
    AgentReadiness,
    PlacedReadiness,
    ReportedReadiness,
)
from nomad_watchdog.fleet.event_recorder import EventRecorder
from nomad_watchdog.fleet.events import FleetEvents
from nomad_watchdog.fleet.host_pressures import HostPressures
from nomad_watchdog.fleet.host_view import HostView
from nomad_watchdog.fleet.incidents import IncidentTracker
from nomad_watchdog.fleet.presence import PresenceView
from nomad_watchdog.fleet.readiness import FleetReadiness
from nomad_watchdog.fleet.reconcile_loop import NoLoop, ReconcileLoop
from nomad_watchdog.fleet.records import RecordCache, RecordChange
from nomad_watchdog.fleet.reports import ReportReceiver
from nomad_watchdog.fleet.trials import TrialDevices
from nomad_watchdog.fleet.verdicts import VerdictTracker
from nomad_watchdog.fleet.views import FleetViews
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Limits, Placement
from nomad_watchdog.registry import Registry


class Fleet:
    """The components that know a fleet. Each listens to those above it; the loop that acts attaches itself."""

    def __init__(
        self,
        registry: Registry,
        limits: Limits,
        clock: Clock,
        log: EventLog | None = None,
        *,
        receives_reports: bool = True,
    ) -> None:
        """`receives_reports`: False for a command that runs once. An agent is then ready if its scheduler reports
        that it runs."""
        self.limits = limits
        self.clock = clock
        self.classes: frozenset[str] | None = None
        """The configured agent classes; None = not known, and a device may have any class."""
        self.placements: dict[Slug, tuple[Placement, ...]] = {}
        """As last read, with our own stops since then."""
        self.readiness = FleetReadiness()
        self.records = RecordCache(registry, clock)
        self.events = FleetEvents(log or EventLog(), clock, self.records, self.placements)
        self.presence = PresenceView(
            self.records, self.placements, self.events, clock, limits.presence
        )
        self.trials = TrialDevices()
        paused_by = self._set_aside
        incidents = IncidentTracker(self.events, limits, clock, paused_by)
        self.recorder = EventRecorder(self.events, incidents, limits, clock, paused_by)
        self.verdicts = VerdictTracker(
            self.records,
            self.placements,
            self.presence,
            self.recorder,
            self.events,
            limits,
            clock,
        )
        self.agents: AgentReadiness = (
            ReportedReadiness(self.records, self.presence, self.verdicts, clock)
            if receives_reports
            else PlacedReadiness(self.records, self.presence, self.placements, lambda: self.limits)
        )
        self.reports = ReportReceiver(
            self.records,
            self.placements,
            self.presence.heartbeats,
            self.verdicts,
            self.recorder,
            self.events,
            clock,
        )
        self.pressures = HostPressures(
            self.records, self.placements, clock, lambda: self.limits.report_stale_s
        )
        self.reports.applied.connect(self.pressures.reported)
        self.hosts = HostView(self.placements, self.pressures, clock)
        self.views = FleetViews(self)
        self._loop: ReconcileLoop = NoLoop()
        self.records.changed.connect(self._records_changed)

    def _set_aside(self, record: DeviceRecord) -> str:
        """Why a device is part of no incident: the ID of its pause, or a roll-out that it is on trial in; "" = it may
        be."""
        return self.presence.paused_by(record) or self.trials.of(record.slug)

    @property
    def registry(self) -> Registry:
        """Where the records are stored."""
        return self.records.registry

    def attach(self, loop: ReconcileLoop) -> None:
        """Announce changes to this loop from now on, and ask it what it knows of placements."""
        self._loop = loop
        self.verdicts.attach(loop)
        self.reports.attach(loop)
        self.views.attach(loop)

    def configure(self, limits: Limits) -> None:
        """Apply these limits from now on."""
        self.limits = limits
        self.presence.heartbeats.rules = limits.presence
        self.verdicts.limits = limits
        self.recorder.configure(limits)

    def apply_placements(
        self,
        found: Mapping[Slug, tuple[Placement, ...]],
        only: Collection[Slug] | None = None,
    ) -> None:
        """Apply a snapshot of the scheduler: of all devices, or `only` of these."""
        if only is None:
            self.placements.clear()
            self.placements.update(found)
            return
        for slug in only:
            if placements := found.get(slug):
                self.placements[slug] = placements
            else:
                self.placements.pop(slug, None)

    def _records_changed(self, changes: Sequence[RecordChange]) -> None:
        self._loop.records_changed([record for _, record in changes])
