"""What the control plane knows of each device: its record, placements, reports, health and verdict.

All but the record lives in memory only and is rebuilt after a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import acceptance, presence
from nomad_watchdog.core.acceptance import Acceptance, AcceptanceKind
from nomad_watchdog.events.log import EventLog
from nomad_watchdog.fleet.refused_reports import RefusedReport
from nomad_watchdog.fleet.serializers import (
    shown_desired,
    shown_health,
    shown_placement,
    shown_report,
)
from nomad_watchdog.fleet.verdicts import Verdicts
from nomad_watchdog.ids import DeviceId, Slug
from nomad_watchdog.model import (
    AgentState,
    Condition,
    DeviceRecord,
    Epoch,
    Health,
    Limits,
    Placement,
    PlacementState,
    Presence,
    Repairs,
    Report,
    Verdict,
)
from nomad_watchdog.registry import Registry

log = logging.getLogger(__name__)


_ANSWERS: Final = (AgentState.OK, AgentState.DEGRADED)
"""States in which something of the device answers: a sign of life."""
_SETTLED: Final = (AgentState.OK, AgentState.DEGRADED, AgentState.OFFLINE)
REPLACED: Final = "replaced"
"""How a report of an agent is counted that was replaced and has not stopped yet."""
MAX_HEARSAY: Final = 10_000
"""Reports of other replicas that wait for our own record; what is lost is said again on the next beat."""


@dataclass(frozen=True, slots=True)
class AgentReport:
    """A report as it came through the door, checked."""

    device_id: DeviceId
    slug: Slug
    epoch: Epoch
    instance: str
    sequence: int
    ready: bool
    state: AgentState
    was_ready: bool
    misses: int
    confirmed: bool
    reason: str
    listen: str
    version: str
    dropped: int = 0
    stopping: bool = False
    repairs: Repairs | None = None
    gateway: str = ""
    gateway_dead: bool = False
    state_age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DeviceView:
    """All that can be shown of one device."""

    record: DeviceRecord
    verdict: Verdict
    since_s: float
    """Age of the verdict's state."""
    placement: Placement | None
    report: Report | None
    health: Health | None


class Observer(Protocol):
    """Who wants to know that something came in (the reconciler)."""

    def records_changed(self, records: Sequence[DeviceRecord]) -> None: ...

    def look_again(self, slug: Slug) -> None: ...

    def is_behind(self, slug: Slug) -> bool:
        """Whether the placements known of a device are older than its record (S8)."""
        ...

    def rivals(self, slug: Slug, instance: str) -> bool:
        """Whether this instance is heard of for the first time beside the accepted one. Then the placements
        known of the device count as older than its record, and are read soon."""
        ...


class Fleet(Verdicts):
    """The devices, what is known of each, and its verdict."""

    def __init__(
        self, registry: Registry, limits: Limits, clock: Clock, history: EventLog | None = None
    ) -> None:
        super().__init__(registry, limits, clock, history or EventLog())
        self.ready_event = asyncio.Event()
        self.ready_reason = "the registry and the scheduler have not been read yet"
        self.status_parts: list[Callable[[], dict[str, object]]] = [self.recorder.status]
        self.explain_parts: list[Callable[[Slug], dict[str, object]]] = [self.explain_presence]
        self.registry_gone = ""
        """Why there is no registry any more, in words: it was wiped or replaced under the running service; ""
        = it is there. What was known before stands, and running agents go on."""
        self.registry_problem = ""
        """Why the registry can't be read now, in words; "" = it can. What was known before stands, and running
        agents go on."""
        self.registry_unwritable = ""
        """Why the registry can't be written until somebody repairs something, in words; "" = it can."""
        self.registry_unreadable = False
        """It can't be read until somebody repairs something: the rights of the token, say."""
        self.classes: frozenset[str] | None = None
        """The agent classes that are configured here; None = not known, and every class may be asked for."""
        self.plan_view: Callable[[], dict[str, object]] = dict
        self._hearsay: dict[Slug, AgentReport] = {}
        self._observer: Observer | None = None
        self._on_report: Callable[[str], None] = lambda _outcome: None
        self.on_accepted: Callable[[AgentReport], None] = lambda _report: None
        """Told of every report that was accepted here, not of those that were overheard."""

    def observe_with(self, observer: Observer, on_report: Callable[[str], None]) -> None:
        """Tell `observer` of what comes in; `on_report` counts acceptance outcomes."""
        self._observer = observer
        self._on_report = on_report

    def go_by(self, limits: Limits) -> None:
        """Judge by these limits from now on."""
        self.limits = limits
        self.attendance.rules = limits.presence
        self.recorder.go_by(limits)

    @property
    def ready(self) -> bool:
        """Both sides have been read, and the registry is there and can be read and written: what is shown
        and decided stands on something, and can be done."""
        return self.ready_event.is_set() and not (
            self.registry_gone or self.registry_unreadable or self.registry_unwritable
        )

    @property
    def reason(self) -> str:
        """Why this is not ready, or what is wrong with the registry, in words; "" = nothing."""
        return (
            self.registry_gone
            or self.registry_problem
            or self.registry_unwritable
            or self.ready_reason
        )

    # -- the registry ---------------------------------------------------------------------------

    def learned(self, news: Sequence[tuple[DeviceRecord | None, DeviceRecord]]) -> None:
        """Tell the reconciler of changed records, and whoever reads the events of changed wishes."""
        super().learned(news)
        for _, record in news if self._hearsay else ():
            if (report := self._hearsay.pop(record.slug, None)) is not None:
                self.overhear(report)
        for before, record in news:
            # Whose agent is being replaced has none that is ready from this moment on: a roll-out that went by
            # the last judgement, seconds old, would think that there is room for one more.
            moved = before is not None and before.epoch != record.epoch
            if moved and self.has_ready_agent(record.slug):
                self.refresh(record.slug)
        if self._observer is not None:
            self._observer.records_changed([record for _, record in news])

    def reset(
        self,
        records: Mapping[Slug, DeviceRecord],
        index: int,
        unreadable: frozenset[Slug] = frozenset(),
    ) -> bool:
        """As `RecordCache.reset`; the first snapshot is no news to those who read events."""
        news = super().reset(records, index, unreadable)
        self.loaded = True
        return news

    # -- reports --------------------------------------------------------------------------------

    async def report(self, report: AgentReport) -> Acceptance:
        """Judge a report and remember it if it is accepted (S1)."""
        result = await self._judge_report(report)
        replaced = result.kind is AcceptanceKind.REFUSED and self._is_predecessor(report)
        self._on_report(REPLACED if replaced else result.kind.value)
        if result.kind is AcceptanceKind.ACCEPTED:
            self.refusals.accepted(report.slug)
            self._remember(report)
            self.on_accepted(report)
        elif replaced:
            now = self.records[report.slug].epoch
            text = f"the agent of epoch {report.epoch} was replaced by that of epoch {now} and is told to stop"
            self.note(report.slug, "agent.replaced", text)
        elif result.kind is AcceptanceKind.REFUSED:
            self.note(report.slug, "refused", f"instance {report.instance}: {result.reason}")
            self.refuse(410, report.slug, report.epoch, why=result.reason)
        if result.kind is not AcceptanceKind.ACCEPTED and self._observer is not None:
            self._observer.look_again(report.slug)
        return result

    def _is_predecessor(self, report: AgentReport) -> bool:
        """Whether this is an agent that the scheduler lists as ours, of an epoch before the record's."""
        record = self.records.get(report.slug)
        return (
            record is not None
            and record.presence is Presence.PRESENT
            and report.epoch < record.epoch
            and any(
                one.epoch == report.epoch and report.instance in one.instances
                for one in self.placements.get(report.slug, ())
            )
        )

    def overhear(self, report: AgentReport) -> bool:
        """Take a report that another replica has accepted, as soon as our own record says the same (S1):
        what it was bound to may not have come through the registry's watch yet."""
        record = self.records.get(report.slug)
        if record is None or self._accept(record, report).kind is not AcceptanceKind.ACCEPTED:
            if len(self._hearsay) >= MAX_HEARSAY:
                self._hearsay.clear()
            self._hearsay[report.slug] = report
            return False
        self._remember(report)
        return True

    def refuse(
        self, status: int, slug: Slug | None, epoch: Epoch | None, *, peer: str = "", why: str = ""
    ) -> None:
        """The API refused a report (401, 403, 410). `slug` and `epoch`: what it claims to be of, unverified."""
        self.refusals.note(slug, RefusedReport(status, epoch, peer, self.clock.monotonic(), why))

    def handed_down(self, report: AgentReport) -> Condition | None:
        """What the predecessors of an agent knew of its device, for an agent that has not found out for
        itself yet; None = nothing was wrong, or the agent knows by now."""
        record = self.records.get(report.slug)
        if record is None or (report.ready and report.state in _SETTLED):
            return None
        return self.condition(record)

    async def _judge_report(self, report: AgentReport) -> Acceptance:
        record = self.records.get(report.slug)
        result = self._accept(record, report)
        if result.kind is AcceptanceKind.ACCEPTED:
            return result
        # Only a fresh read may refuse or bind: nobody is stopped on the word of an old cache (S8).
        record = await self.registry.get(report.slug)
        if record is not None:
            self.learn([record])
        result = self._accept(record, report)
        if result.kind is not AcceptanceKind.BIND or record is None:
            return result
        (bound,) = await self.commit([presence.bind(record, report.instance)])
        if bound is None:
            return Acceptance(AcceptanceKind.UNSURE, "another writer was faster")
        self.learn([bound])
        return Acceptance(AcceptanceKind.ACCEPTED)

    def _accept(self, record: DeviceRecord | None, report: AgentReport) -> Acceptance:
        # Placements older than the record may still show the instance that it has just replaced.
        behind = self._observer is not None and self._observer.is_behind(report.slug)
        current = [
            placement
            for placement in (() if behind else self.placements.get(report.slug, ()))
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
            kept=bool(self.attendance.keeps(report.slug, self.clock.monotonic())),
        )
        if result.rival and self._observer and self._observer.rivals(report.slug, report.instance):
            # The other may just have ended, and this one be what the scheduler started in its place (S8).
            return Acceptance(AcceptanceKind.UNSURE, f"{result.reason}, or was until now")
        return result

    def _remember(self, report: AgentReport) -> None:
        if report.ready and report.state in _ANSWERS:
            self.attendance.answers(report.slug, self.clock.monotonic())
        track = self._track(report.slug)
        last = track.report
        if (
            last is not None
            and (last.epoch, last.instance) == (report.epoch, report.instance)
            and last.sequence - 2 <= report.sequence < last.sequence
            and self.clock.monotonic() - last.received_at < 1.0
        ):
            return  # overtaken on the way; a restarted agent begins again, but not within a second
        was_ready = report.was_ready or (last is not None and last.was_ready)
        track.report = Report(
            epoch=report.epoch,
            instance=report.instance,
            ready=report.ready,
            state=report.state,
            was_ready=was_ready,
            misses=report.misses,
            confirmed=report.confirmed,
            reason=report.reason,
            version=report.version,
            address=report.listen,
            received_at=self.clock.monotonic(),
            sequence=report.sequence,
            stopping=report.stopping,
            repairs=report.repairs,
            gateway=report.gateway,
            gateway_dead=report.gateway_dead,
            state_age_s=report.state_age_s,
        )
        if report.slug in self.records:
            before = last.repairs if last is not None else None
            self.recorder.repaired(self.records[report.slug], before, report.repairs)
        if report.ready and report.slug in self.records:
            self.recorder.ready(self.records[report.slug])
        self.refresh(report.slug)

    # -- what is shown --------------------------------------------------------------------------

    def view(self, slug: Slug) -> DeviceView | None:
        """One device as it is now, or None."""
        record = self.records.get(slug)
        if record is None:
            return None
        judged = self.refresh(slug)
        track = self._track(slug)
        evidence = self._evidence(record, track)
        placement = evidence.placement or next(iter(self.placements.get(slug, ())), None)
        return DeviceView(
            record=record,
            verdict=judged,
            since_s=self.clock.monotonic() - track.since,
            placement=placement,
            report=evidence.report,
            health=evidence.health,
        )

    def status(self) -> dict[str, object]:
        """Summary for the API, the page and the CLI."""
        status: dict[str, object] = {
            "ready": self.ready,
            "reason": self.reason,
            "devices": sum(r.presence is Presence.PRESENT for r in self.records.values()),
            "verdicts": {state.value: n for state, n in self.counts().items()},
            "placements": sum(
                p.state is not PlacementState.DEAD
                for found in self.placements.values()
                for p in found
            ),
            "registry_index": self.index,
            "unheard": {why.value: n for why, n in self.unheard().items()},
            "unlisted": self.unlisted(),
            "paused": len(self.paused()),
            "pauses_problem": self.pauses.problem,
            "flapping": self.attendance.flapping(self.clock.monotonic()),
        }
        for part in self.status_parts:
            status.update(part())
        return status

    def explain(self, slug: Slug) -> dict[str, object]:
        """Why the device is in its state: decisions, inputs, ids, checks and what comes next."""
        view = self.view(slug)
        if view is None:
            return {}
        record = view.record
        track = self._track(slug)
        beat = self.attendance.beats.get(slug)
        explained: dict[str, object] = {
            "id": record.device.id,
            "slug": slug,
            "verdict": view.verdict.state.value,
            "reason": view.verdict.reason,
            "since_s": round(view.since_s, 1),
            "desired": shown_desired(record),
            "observed": [shown_placement(p) for p in self.placements.get(slug, ())],
            "report": shown_report(track.report, self.clock.monotonic()),
            "condition": self.shown_condition(record),
            "consul": shown_health(view.health),
            "heartbeat_age_s": None if beat is None else round(self.clock.monotonic() - beat, 1),
            "events": [event.shown() for event in self.told.of_device(slug)],
        }
        explained.update(self.recorder.explain(record))
        for part in self.explain_parts:
            explained.update(part(slug))
        return explained

    def shown_condition(self, record: DeviceRecord) -> dict[str, object] | None:
        """What is wrong with a device, and whether the registry has it already; None = nothing."""
        found = self.condition(record)
        if found is None:
            return None
        return {
            "state": found.state.value,
            "since": found.since,
            "age_s": round(max(0.0, self.clock.wall() - found.since), 1),
            "reason": found.reason,
            "misses": found.misses,
            "stored": found == record.condition,
        }

    def plan(self) -> dict[str, object]:
        """What the next pass would do."""
        return self.plan_view()
