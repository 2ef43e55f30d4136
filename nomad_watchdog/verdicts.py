"""The verdict of each device, judged anew whenever something came in, and as time goes by.

`core.verdict` decides; here stands what it is given: the record, the placement, the last accepted report,
Consul's word, and since when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog import failpoints
from nomad_watchdog.chronicle import Change, Chronicle
from nomad_watchdog.clock import Clock
from nomad_watchdog.core import verdict
from nomad_watchdog.history import History
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    DeviceRecord,
    Health,
    Limits,
    Monotonic,
    PlacementState,
    Report,
    Verdict,
    VerdictState,
)
from nomad_watchdog.registry import Registry
from nomad_watchdog.rollcall import RollCall

_STUCK: Final = (VerdictState.UNWATCHED, VerdictState.FAILING)
_AGENT_READY: Final = frozenset(
    {
        VerdictState.WATCHED,
        VerdictState.SUSPECT,
        VerdictState.REPAIRING,
        VerdictState.OFFLINE,
    }
)


@dataclass(slots=True)
class _Track:
    """What is remembered of a device between looks."""

    waiting_since: Monotonic
    state: VerdictState | None = None
    reason: str = ""
    since: Monotonic = field(default=Monotonic(0.0))
    report: Report | None = None


class Verdicts(RollCall):
    """The devices as the registry has them, and the verdict of each."""

    def __init__(self, registry: Registry, limits: Limits, clock: Clock, history: History) -> None:
        super().__init__(registry, clock, limits.presence, history)
        self.limits = limits
        self.chronicle = Chronicle(self.history, limits, clock)
        self.chronicle.paused = self.paused_by
        self.health: Mapping[Slug, Health] = {}
        """Consul's word on each agent; empty when Consul is not asked."""
        self.obstacle: Callable[[Slug], str] = lambda _slug: ""
        """Why a device can't have an agent now, in words."""
        self._tracks: dict[Slug, _Track] = {}
        self._by_state: Counter[VerdictState] = Counter()

    def forgotten(self, slugs: Sequence[Slug]) -> None:
        """Drop what was known of devices whose record is gone."""
        super().forgotten(slugs)
        for slug in slugs:
            self.chronicle.forget(slug)
            track = self._tracks.pop(slug, None)
            if track is not None and track.state is not None:
                self._by_state[track.state] -= 1

    def hear(self, ids: Iterable[str], *, beats: bool = True) -> tuple[list[bool], list[Slug]]:
        """As `RollCall.hear`; that a device lives that was thought offline is not told two seconds late."""
        names = list(ids)
        answer = super().hear(names, beats=beats)
        if beats and self._by_state[VerdictState.OFFLINE]:
            for name in names:
                slug = self.slug_by_id.get(name)
                track = None if slug is None else self._tracks.get(slug)
                if slug is not None and track is not None and track.state is VerdictState.OFFLINE:
                    self.refresh(slug)
        return answer

    def _track(self, slug: Slug) -> _Track:
        track = self._tracks.get(slug)
        if track is None:
            track = self._tracks[slug] = _Track(waiting_since=self.clock.monotonic())
        return track

    def refresh(self, slug: Slug) -> Verdict:
        """Judge one device now; a changed state is an event."""
        record = self.records[slug]
        track = self._track(slug)
        now = self.clock.monotonic()
        evidence = self._evidence(record, track)
        judged = verdict.judge(record, evidence, self.limits, now)
        if judged.state in _AGENT_READY:
            track.waiting_since = now
        gateway = evidence.report.gateway if evidence.report is not None else ""
        self.chronicle.look(record, evidence.placement, track.state or judged.state, gateway)
        if judged.state is not track.state:
            was = track.state
            self._by_state[judged.state] += 1
            if was is not None:
                self._by_state[was] -= 1
            lasted_s = now - track.since if was is not None else 0.0
            self.chronicle.changed(Change(record, judged, evidence, was, lasted_s))
            track.state, track.since = judged.state, now
            if was is not None:
                failpoints.reached("K9")
        track.reason = judged.reason
        return judged

    def _evidence(self, record: DeviceRecord, track: _Track) -> verdict.Evidence:
        found = self.placements.get(record.slug, ())
        live = [p for p in found if p.state is not PlacementState.DEAD]
        current = next((p for p in live if p.epoch == record.epoch), None)
        report = track.report
        if report is not None and (report.epoch, report.instance) != (
            record.epoch,
            record.instance,
        ):
            report = None
        health = self.health.get(record.slug)
        return verdict.Evidence(
            placement=current,
            report=report,
            health=health if health is not None and health.epoch == record.epoch else None,
            waiting_since=track.waiting_since,
            leaving=bool(live),
            obstacle=self.obstacle(record.slug),
            placed_at=self.chronicle.placed_at(record),
            beat_at=self.attendance.beats.get(record.slug),
            grace_s=self.chronicle.grace(record).seconds,
            kept=self.attendance.keeps(record.slug, self.clock.monotonic()),
        )

    def refresh_all(self) -> None:
        """Judge every device: time alone changes verdicts (grace, staleness)."""
        for slug in self.records:
            self.refresh(slug)
        self.chronicle.settle()

    def unready(self) -> int:
        """Present devices without a ready accepted agent, as last judged, but for those that are
        paused: somebody else is at work there. Constant time when nothing is paused."""
        settled = sum(self._by_state[state] for state in (*_AGENT_READY, VerdictState.DEPARTED))
        resting = sum(
            n
            for state, n in self.paused_counts().items()
            if state not in _AGENT_READY and state is not VerdictState.DEPARTED
        )
        return max(0, len(self.records) - settled - resting)

    def has_ready_agent(self, slug: Slug) -> bool:
        """Whether the accepted agent is ready, as last judged."""
        track = self._tracks.get(slug)
        return track is not None and track.state in _AGENT_READY

    def is_stuck(self, slug: Slug) -> bool:
        """Whether the agent at the record's epoch is surely not ready and has had its time, as last judged:
        it has never said anything, or says now that it is not ready. One that has reported and is not
        heard may be well, and only cut off from us."""
        record, track = self.records.get(slug), self._tracks.get(slug)
        if record is None or track is None or track.state not in _STUCK:
            return False
        if track.state is VerdictState.FAILING or not record.instance:
            return True
        report = track.report
        return (
            report is not None
            and (report.epoch, report.instance) == (record.epoch, record.instance)
            and not report.ready
            and self.clock.monotonic() - report.received_at <= self.limits.report_stale_s
        )

    def paused_counts(self) -> Counter[VerdictState]:
        """Paused devices by the state last judged."""
        tracks = map(self._track, self.paused())
        return Counter(track.state for track in tracks if track.state is not None)

    def counts(self) -> dict[VerdictState, int]:
        """Devices by the state last judged."""
        return {state: self._by_state[state] for state in VerdictState}
