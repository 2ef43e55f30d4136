"""Reports of agents: which are accepted (S1), and what an accepted report changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import acceptance, presence
from nomad_watchdog.core.acceptance import Acceptance, AcceptanceKind
from nomad_watchdog.fleet.event_recorder import EventRecorder
from nomad_watchdog.fleet.events import FleetEvents
from nomad_watchdog.fleet.heartbeats import Heartbeats
from nomad_watchdog.fleet.reconcile_loop import NoLoop, ReconcileLoop
from nomad_watchdog.fleet.records import RecordCache, RecordChange
from nomad_watchdog.fleet.refused_reports import RefusedReport
from nomad_watchdog.fleet.verdicts import VerdictTracker
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    AgentState,
    Condition,
    DeviceRecord,
    Epoch,
    Placement,
    PlacementState,
    Presence,
    Report,
)
from nomad_watchdog.signals import Signal

REPLACED: Final = "replaced"
"""The outcome of a report of an agent that was replaced and has not stopped yet."""
MAX_REPLICATED: Final = 10_000
"""Reports of other replicas that wait for our own record; a discarded one is replaced by the agent's next report."""
_ANSWERS: Final = (AgentState.OK, AgentState.DEGRADED)
"""States in which the device answers: a sign of life."""
_SETTLED: Final = (AgentState.OK, AgentState.DEGRADED, AgentState.OFFLINE)


class ReportReceiver:
    """Accepts or refuses reports."""

    def __init__(  # the components of one fleet
        self,
        records: RecordCache,
        placements: Mapping[Slug, tuple[Placement, ...]],
        heartbeats: Heartbeats,
        verdicts: VerdictTracker,
        recorder: EventRecorder,
        events: FleetEvents,
        clock: Clock,
    ) -> None:
        self._records = records
        self._placements = placements
        self._heartbeats = heartbeats
        self._verdicts = verdicts
        self._recorder = recorder
        self._events = events
        self._clock = clock
        self._loop: ReconcileLoop = NoLoop()
        self._waiting: dict[Slug, Report] = {}
        """Reports of other replicas that our own records do not permit yet."""
        self.judged: Signal[[str]] = Signal()
        """A report was received here: the kind of acceptance, or REPLACED."""
        self.accepted: Signal[[Report]] = Signal()
        """A report was accepted here, not by another replica."""
        self.applied: Signal[[Report]] = Signal()
        """A report was accepted, here or by another replica, and none overtook it."""
        records.changed.connect(self._records_changed)

    def attach(self, loop: ReconcileLoop) -> None:
        """Ask this loop from now on what is known of the placements."""
        self._loop = loop

    def _records_changed(self, changes: Sequence[RecordChange]) -> None:
        for _, record in changes if self._waiting else ():
            if (report := self._waiting.pop(record.slug, None)) is not None:
                self.accept_replicated(report)

    async def receive(self, report: Report) -> Acceptance:
        """Judge a report, and apply it if it is accepted (S1)."""
        result = await self._judge(report)
        replaced = result.kind is AcceptanceKind.REFUSED and self._is_predecessor(report)
        self.judged.emit(REPLACED if replaced else result.kind.value)
        if result.kind is AcceptanceKind.ACCEPTED:
            self._verdicts.refusals.accepted(report.slug)
            self._apply(report)
            self.accepted.emit(report)
        elif replaced:
            now = self._records[report.slug].epoch
            text = f"the agent of epoch {report.epoch} was replaced by that of epoch {now} and is told to stop"
            self._events.note(report.slug, "agent.replaced", text)
        elif result.kind is AcceptanceKind.REFUSED:
            text = f"instance {report.instance}: {result.reason}"
            self._events.note(report.slug, "refused", text)
            self.refused(410, report.slug, report.epoch, why=result.reason)
        if result.kind is not AcceptanceKind.ACCEPTED:
            self._loop.read_again(report.slug)
        return result

    def accept_replicated(self, report: Report) -> bool:
        """Apply a report that another replica has accepted, once our own record permits it (S1): the record that
        it is bound to may not have arrived through the registry's watch yet."""
        record = self._records.get(report.slug)
        if record is None or self._accept(record, report).kind is not AcceptanceKind.ACCEPTED:
            if len(self._waiting) >= MAX_REPLICATED:
                self._waiting.clear()
            self._waiting[report.slug] = report
            return False
        self._apply(report)
        return True

    def refused(
        self, status: int, slug: Slug | None, epoch: Epoch | None, *, peer: str = "", why: str = ""
    ) -> None:
        """The API refused a report (401, 403, 410). `slug` and `epoch`: the report's claim, not verified."""
        refusal = RefusedReport(status, epoch, peer, self._clock.monotonic(), why)
        self._verdicts.refusals.note(slug, refusal)

    def inherited(self, report: Report) -> Condition | None:
        """The condition of the device for an agent that has not determined it itself yet; None = nothing was
        wrong, or the agent knows by now."""
        record = self._records.get(report.slug)
        if record is None or (report.ready and report.state in _SETTLED):
            return None
        return self._verdicts.condition(record)

    def _is_predecessor(self, report: Report) -> bool:
        """Whether this is an agent of an earlier epoch that the scheduler lists as ours."""
        record = self._records.get(report.slug)
        return (
            record is not None
            and record.presence is Presence.PRESENT
            and report.epoch < record.epoch
            and any(
                one.epoch == report.epoch and report.instance in one.instances
                for one in self._placements.get(report.slug, ())
            )
        )

    async def _judge(self, report: Report) -> Acceptance:
        record = self._records.get(report.slug)
        result = self._accept(record, report)
        if result.kind is AcceptanceKind.ACCEPTED:
            return result
        # Only a fresh read may refuse or bind: no agent is stopped because our copy is old (S8).
        record = await self._records.registry.get(report.slug)
        if record is not None:
            self._records.learn([record])
        result = self._accept(record, report)
        if result.kind is not AcceptanceKind.BIND or record is None:
            return result
        (bound,) = await self._records.commit([presence.bind(record, report.instance)])
        if bound is None:
            return Acceptance(AcceptanceKind.UNSURE, "another writer was faster")
        self._records.learn([bound])
        return Acceptance(AcceptanceKind.ACCEPTED)

    def _accept(self, record: DeviceRecord | None, report: Report) -> Acceptance:
        # Placements older than the record may still show the instance that it has just replaced.
        behind = self._loop.is_behind(report.slug)
        current = [
            placement
            for placement in (() if behind else self._placements.get(report.slug, ()))
            if placement.epoch == report.epoch
        ]
        live = {instance for placement in current for instance in placement.instances}
        stopping = {
            instance
            for placement in current
            if placement.state is PlacementState.STOPPING
            for instance in placement.instances
        }
        result = acceptance.accept(
            record,
            report.epoch,
            report.instance,
            live,
            stopping=stopping,
            kept=bool(self._heartbeats.keeps(report.slug, self._clock.monotonic())),
        )
        if result.rival and self._loop.is_new_rival(report.slug, report.instance):
            # The other may just have ended, and the scheduler may have started this one in its place (S8).
            return Acceptance(AcceptanceKind.UNSURE, f"{result.reason}, or was until now")
        return result

    def _apply(self, report: Report) -> None:
        now = self._clock.monotonic()
        if report.ready and report.state in _ANSWERS:
            self._heartbeats.answers(report.slug, now)
        last = self._verdicts.last_report(report.slug)
        if last is not None and _was_overtaken(report, last, now - last.received_at):
            return
        was_ready = report.was_ready or (last is not None and last.was_ready)
        self._verdicts.reported(replace(report, was_ready=was_ready, received_at=now))
        record = self._records.get(report.slug)
        if record is not None:
            before = last.repairs if last is not None else None
            self._recorder.repaired(record, before, report.repairs)
            if report.ready:
                self._recorder.ready(record)
        self._verdicts.judge(report.slug)
        self.applied.emit(report)


def _was_overtaken(report: Report, last: Report, since_s: float) -> bool:
    """Whether a newer report of the same agent arrived first. A restarted agent counts from the start, but it does
    not restart within a second."""
    return (
        (last.epoch, last.instance) == (report.epoch, report.instance)
        and last.sequence - 2 <= report.sequence < last.sequence
        and since_s < 1.0
    )
