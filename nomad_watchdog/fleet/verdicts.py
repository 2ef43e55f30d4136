"""The verdict of each device: judged whenever one of its inputs changes, and periodically.

`core.verdict` decides. This module collects its inputs: the record, the placement, the last accepted report,
Consul's health check, and when each of them began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from nomad_watchdog import failpoints
from nomad_watchdog.clock import Clock
from nomad_watchdog.core import device_condition as condition
from nomad_watchdog.core import verdict
from nomad_watchdog.fleet import agent_events
from nomad_watchdog.fleet.event_recorder import Change, EventRecorder
from nomad_watchdog.fleet.events import FleetEvents
from nomad_watchdog.fleet.pending_conditions import PendingConditions
from nomad_watchdog.fleet.presence import PresenceView
from nomad_watchdog.fleet.previous_run import PreviousRun
from nomad_watchdog.fleet.reconcile_loop import NoLoop, ReconcileLoop
from nomad_watchdog.fleet.records import RecordCache, RecordChange
from nomad_watchdog.fleet.refused_reports import RefusedReports
from nomad_watchdog.fleet.track import Counted, Track
from nomad_watchdog.fleet.verdict_totals import VerdictTotals
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    Condition,
    DeviceRecord,
    Health,
    Limits,
    Monotonic,
    Placement,
    PlacementState,
    Report,
    Unheard,
    Verdict,
    VerdictState,
    WallTime,
)

FRESH_S: Final = 2.0
"""A judgement is not repeated for a reader within this time."""


class VerdictTracker:
    """The last verdict of each device, and what is remembered between two judgements of it."""

    def __init__(  # the components of one fleet
        self,
        records: RecordCache,
        placements: Mapping[Slug, tuple[Placement, ...]],
        presence: PresenceView,
        recorder: EventRecorder,
        events: FleetEvents,
        limits: Limits,
        clock: Clock,
    ) -> None:
        self.limits = limits
        self.health: Mapping[Slug, Health] = {}
        """Consul's health check of each agent; empty when Consul is not used."""
        self.refusals = RefusedReports()
        """Reports that the API refused."""
        self.conditions = PendingConditions()
        """Conditions that are not in the registry yet."""
        self._records = records
        self._placements = placements
        self._presence = presence
        self._recorder = recorder
        self._events = events
        self._clock = clock
        self._loop: ReconcileLoop = NoLoop()
        self._tracks: dict[Slug, Track] = {}
        self.totals = VerdictTotals()
        self._previous = PreviousRun()
        records.changed.connect(self._records_changed)
        records.forgotten.connect(self._records_forgotten)
        presence.recorded.connect(self._heartbeats_recorded)

    def attach(self, loop: ReconcileLoop) -> None:
        """Ask this loop from now on why a device cannot have an agent."""
        self._loop = loop

    def restore(self, verdicts: Iterable[tuple[Slug, str, float]]) -> None:
        """Continue with the last verdict event of each device: slug, kind and Unix seconds."""
        self._previous.restore(verdicts)

    def _records_changed(self, changes: Sequence[RecordChange]) -> None:
        for before, record in changes:
            known = None if before is None else self.conditions.of(before)
            differs = before is not None and not condition.same(known, record.condition)
            if differs and not self.conditions.is_ours(record):
                # What another replica has written rests on a later report than ours.
                self._track(record.slug).overruled_at = self._clock.monotonic()
            self.conditions.stored(record)
            if self._records.loaded and self._is_due(before, record):
                self.judge(record.slug)

    def _is_due(self, before: DeviceRecord | None, record: DeviceRecord) -> bool:
        """Whether a changed record is judged at once. A device whose agent is being replaced has no ready agent from
        this moment on: a roll-out must not count it as ready until the next periodic judgement."""
        track = self._tracks.get(record.slug)
        replaced = before is not None and before.epoch != record.epoch
        return replaced and track is not None and track.ready

    def _records_forgotten(self, slugs: Sequence[Slug]) -> None:
        for slug in slugs:
            self._recorder.forget(slug)
            self.conditions.forget(slug)
            self._previous.forget(slug)
            if (track := self._tracks.pop(slug, None)) is not None:
                self.totals.change(slug, track.counted, Counted())

    def _heartbeats_recorded(self, ids: Sequence[str]) -> None:
        """Judge devices that were offline at once, instead of at the next periodic judgement."""
        if not self.totals.by_state[VerdictState.OFFLINE]:
            return
        for device_id in ids:
            slug = self._records.slug_by_id.get(device_id)
            track = None if slug is None else self._tracks.get(slug)
            if slug is not None and track is not None and track.state is VerdictState.OFFLINE:
                self.judge(slug)

    def _track(self, slug: Slug) -> Track:
        track = self._tracks.get(slug)
        if track is None:
            now = self._clock.monotonic()
            track = self._tracks[slug] = Track(waiting_since=now, quiet_since=now)
        return track

    def last(self, slug: Slug) -> tuple[Verdict, Monotonic]:
        """The verdict of a known device as last judged, and when its state began. A device that was not judged yet
        has its stored condition."""
        track, kept = self._tracks.get(slug), self._records[slug].condition
        now = self._clock.monotonic()
        if track is not None and track.verdict is not None:
            return track.verdict, track.since
        if kept is None:
            return Verdict(VerdictState.STARTING, "not judged yet"), now
        since = self._monotonic(kept.since, now)
        return Verdict(VerdictState(kept.state.value), kept.reason), since

    def last_report(self, slug: Slug) -> Report | None:
        """The last accepted report about a device, of whatever agent."""
        track = self._tracks.get(slug)
        return None if track is None else track.report

    def report_of_agent(self, record: DeviceRecord) -> Report | None:
        """The last report of the accepted agent."""
        report = self.last_report(record.slug)
        if report is None or (report.epoch, report.instance) != (record.epoch, record.instance):
            return None
        return report

    def health_of(self, record: DeviceRecord) -> Health | None:
        """Consul's health check of the agent of the record's epoch."""
        health = self.health.get(record.slug)
        return health if health is not None and health.epoch == record.epoch else None

    def reported(self, report: Report) -> None:
        """A report was accepted; the caller has the device judged."""
        self._track(report.slug).report = report

    def condition(self, record: DeviceRecord) -> Condition | None:
        """What is wrong with a device: as it will be in the registry if it is not stored yet."""
        return self.conditions.of(record)

    def judge(self, slug: Slug) -> Verdict:
        """Judge one device now; a changed state is an event."""
        record = self._records[slug]
        track = self._track(slug)
        now = self._clock.monotonic()
        if track.epoch != record.epoch:
            track.carried = self._previous.carried(record) if track.state is None else None
            track.epoch = record.epoch
            track.quiet_since = now
        evidence = self._evidence(record, track)
        if restarts := track.restarted(evidence.placement, now):
            agent_events.restarted(self._events, slug, track, restarts)
        found = verdict.of_agent(record, evidence, self.limits, now)
        if evidence.report is not None and evidence.report.received_at < track.overruled_at:
            found = replace(found, decides=False)
        kept = self._condition(record, found, evidence, now)
        replaced = verdict.is_replaced(record, evidence)
        judged = condition.shown(found, kept, replaced=replaced)
        self._recorder.incidents.observe(record, evidence, track.state or judged.state)
        before = track.counted
        self._apply_agent(slug, track, found, judged)
        if judged.state is not track.state:
            self._change(record, track, judged, kept, evidence)
        track.verdict, track.judged = judged, (record.index, now)
        self.totals.change(slug, before, track.counted)
        return judged

    def refresh(self, slug: Slug) -> None:
        """Judge a device before it is read, unless it is unknown, or was judged within FRESH_S with the same record."""
        record, track = self._records.get(slug), self._tracks.get(slug)
        if record is None:
            return
        index, at = (-1, 0.0) if track is None else track.judged
        if index != record.index or self._clock.monotonic() - at > FRESH_S:
            self.judge(slug)

    def _apply_agent(self, slug: Slug, track: Track, found: Verdict, judged: Verdict) -> None:
        """Remember what the verdict states about the agent, and publish what has changed of it."""
        now = self._clock.monotonic()
        if judged.ready:
            track.waiting_since, track.was_watched = now, True
        if judged.unheard is not track.unheard:
            track.unheard = judged.unheard
            stale_s = self.limits.report_stale_s
            agent_events.reports_changed(self._events, slug, found, track.report, now, stale_s)
        if found.unlisted is not track.unlisted:
            track.unlisted = found.unlisted
            agent_events.listing_changed(self._events, slug, found)
        if not found.suspected:
            track.suspect_since = None
        elif track.suspect_since is None:
            track.suspect_since = now
        track.agent, track.ready = found.state, judged.ready

    def _change(
        self,
        record: DeviceRecord,
        track: Track,
        judged: Verdict,
        kept: Condition | None,
        evidence: verdict.Evidence,
    ) -> None:
        """The device has another state."""
        now, was = self._clock.monotonic(), track.state
        lasted_s = now - track.since if was is not None else 0.0
        since, is_published = self._began(record, judged, kept, evidence.report, now)
        change = Change(record, judged, evidence, was, lasted_s, is_published=is_published)
        self._recorder.verdict_changed(change)
        track.since = since
        if was is not None:
            failpoints.reached("K9")

    def _condition(
        self, record: DeviceRecord, found: Verdict, evidence: verdict.Evidence, now: Monotonic
    ) -> Condition | None:
        kept = self.condition(record)
        if not found.decides and found.state is not VerdictState.DEPARTED:
            return kept
        report = evidence.report
        age_s = verdict.reported_age_s(found.state, report, now)
        began_at = WallTime(self._clock.wall() - age_s)
        track = self._tracks[record.slug]
        misses = report.misses if report is not None else 0
        renew = track.confirmed != record.epoch or now >= track.renew_at
        fresh = condition.after(found, kept, began_at, misses, renew=renew)
        track.confirmed = record.epoch
        if fresh is not kept:
            renewed = condition.same(kept, fresh)
            self.conditions.write(record, fresh, now, renewed=renewed)
            track.renewals = track.renewals + 1 if renewed else 0
            after_s = condition.renew_after_s(track.renewals) if renewed else 0.0
            track.renew_at = Monotonic(now + after_s)
            if renewed and fresh is not None and kept is not None:
                data = {"state": fresh.state.value, "reason": fresh.reason, "was": kept.reason}
                self._events.note(record.slug, "condition.changed", fresh.reason, **data)
        return fresh

    def _began(
        self,
        record: DeviceRecord,
        judged: Verdict,
        kept: Condition | None,
        report: Report | None,
        now: Monotonic,
    ) -> tuple[Monotonic, bool]:
        """When the new state began, by our own clock, and whether an earlier run has published it.

        The first state of a device in this run may have begun long before. The registry, the stored events and the
        agent know when."""
        track, before = self._tracks[record.slug], self._previous.of(record.slug)
        first = not track.is_conclusive
        if judged.state is not VerdictState.STARTING:
            track.is_conclusive = True
            self._previous.forget(record.slug)
        is_published = first and before is not None and before.state == judged.state.value
        if kept is not None and judged.state.value == kept.state.value:
            return self._monotonic(kept.since, now), is_published
        age_s = verdict.reported_age_s(judged.state, report, now) if first else 0.0
        if is_published and before is not None:
            stored = self._monotonic(before.at, now)
            # The agent knows whether the state ended and began again while no control plane ran.
            began = max(stored, Monotonic(now - age_s)) if age_s else stored
            return began, True
        return Monotonic(now - age_s), False

    def _monotonic(self, at: WallTime, now: Monotonic) -> Monotonic:
        """A moment of the past by the wall clock, by ours: for people, never to decide."""
        return Monotonic(now - max(0.0, self._clock.wall() - at))

    def _evidence(self, record: DeviceRecord, track: Track) -> verdict.Evidence:
        found = self._placements.get(record.slug, ())
        live = [p for p in found if p.state is not PlacementState.DEAD]
        current = next((p for p in live if p.epoch == record.epoch), None)
        track.ran(current, self._clock.monotonic())
        quiet_since, now = track.quiet_since, self._clock.monotonic()
        if track.report is not None:
            quiet_since = max(quiet_since, track.report.received_at)
        report = self.report_of_agent(record)
        unlisted = (
            current is not None and report is not None and report.instance not in current.instances
        )
        if not unlisted:
            track.unlisted_since = None
        elif track.unlisted_since is None:
            track.unlisted_since = now
        health = self.health_of(record)
        return verdict.Evidence(
            placement=current,
            report=report,
            health=health,
            waiting_since=track.waiting_since,
            leaving=bool(live),
            obstacle=self._loop.obstacle(record.slug),
            placed_at=self._recorder.dispatched_at(record),
            beat_at=self._presence.heartbeats.beats.get(record.slug),
            grace_s=self._recorder.grace(record).seconds,
            kept=self._presence.heartbeats.keeps(record.slug, now) if live else "",
            condition=self.condition(record),
            quiet_since=quiet_since,
            running_since=track.running_since,
            was_watched=track.was_watched
            or record.condition is not None
            or self._previous.was_watched(record.slug),
            is_unwatched=track.state is VerdictState.UNWATCHED,
            suspect_since=track.suspect_since,
            unlisted_since=track.unlisted_since,
            before=track.carried,
            refusal=""
            if now - quiet_since <= self.limits.report_stale_s
            else self.refusals.of(
                record.slug,
                record.epoch,
                _addresses(track.report, self.health.get(record.slug)),
                now,
            ),
        )

    def judge_all(self) -> None:
        """Judge every device: time alone changes verdicts (grace, staleness)."""
        for slug in self._records:
            self.judge(slug)
        self._recorder.tick()

    def track_of(self, slug: Slug) -> Track | None:
        """What is remembered of a device; None = it was not judged yet."""
        return self._tracks.get(slug)

    def paused_counts(self) -> Counter[VerdictState]:
        """Paused devices by the state last judged."""
        tracks = map(self._tracks.get, self._presence.paused())
        return Counter(one.state for one in tracks if one is not None and one.state is not None)

    def unheard(self) -> dict[Unheard, int]:
        """The number of running agents without accepted reports, by reason, as last judged."""
        refused = sum(bool(self.refused(slug)) for slug in self.refusals.slugs())
        return {
            why: self.totals.unheard[why] + (refused if why is Unheard.REFUSED else 0)
            for why in Unheard
        }

    def refused(self, slug: Slug) -> str:
        """Why the reports of a device's agent are refused, before its silence lasts long enough for a verdict; "" =
        they are not. Counts only refusals from the agent's own address, as the report's claim is not verified."""
        record, track = self._records.get(slug), self._tracks.get(slug)
        if record is None or track is None or track.unheard is not None:
            return ""
        known = _addresses(track.report, self.health.get(slug))
        return self.refusals.at(slug, record.epoch, known, self._clock.monotonic())

    def counts(self) -> dict[VerdictState, int]:
        """Devices by the state last judged."""
        return {state: self.totals.by_state[state] for state in VerdictState}


def _addresses(report: Report | None, health: Health | None) -> list[str]:
    """Where an agent is, as far as is known."""
    listens = report.listen.rpartition(":")[0].strip("[]") if report is not None else ""
    return [one for one in (listens, health.address if health is not None else "") if one]
