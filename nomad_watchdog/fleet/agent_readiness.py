"""Which agents are ready: by their reports, or, for a command that receives none, by their placements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from nomad_watchdog.clock import Clock
from nomad_watchdog.fleet.presence import PresenceView
from nomad_watchdog.fleet.records import RecordCache
from nomad_watchdog.fleet.verdicts import VerdictTracker
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Limits, Placement, PlacementState, Presence, VerdictState

_STUCK: Final = (VerdictState.UNWATCHED, VerdictState.FAILING)


class AgentReadiness(Protocol):
    """What roll-outs and migrations ask before they replace more agents."""

    def unready(self) -> int:
        """The number of present devices without a ready agent, except for paused ones."""
        ...

    def has_ready_agent(self, slug: Slug) -> bool:
        """Whether the accepted agent is ready."""
        ...

    def is_stuck(self, slug: Slug) -> bool:
        """Whether the agent of the record's epoch is certainly not ready and has had its time."""
        ...


class ReportedReadiness:
    """As last judged, by the agents' reports."""

    def __init__(
        self, records: RecordCache, presence: PresenceView, verdicts: VerdictTracker, clock: Clock
    ) -> None:
        self._records, self._presence = records, presence
        self._verdicts, self._clock = verdicts, clock

    def unready(self) -> int:
        """As `AgentReadiness`. Constant time while no device is paused."""
        tracks = map(self._verdicts.track_of, self._presence.paused())
        paused = sum(track is None or not track.settled for track in tracks)
        return max(0, len(self._records) - self._verdicts.totals.settled - paused)

    def has_ready_agent(self, slug: Slug) -> bool:
        """As `AgentReadiness`."""
        track = self._verdicts.track_of(slug)
        return track is not None and track.ready

    def is_stuck(self, slug: Slug) -> bool:
        """As `AgentReadiness`: the agent has never reported, or reports now that it is not ready. An agent whose
        reports no longer arrive may be ready, and only cut off from this control plane."""
        record, track = self._records.get(slug), self._verdicts.track_of(slug)
        if record is None or track is None or track.agent not in _STUCK:
            return False
        if track.agent is VerdictState.FAILING or not record.instance:
            return True
        report = self._verdicts.report_of_agent(record)
        if report is None or report.ready:
            return False
        age_s = self._clock.monotonic() - report.received_at
        return age_s <= self._verdicts.limits.report_stale_s


class PlacedReadiness:
    """For a command that receives no reports: an agent is ready if its scheduler reports that it runs."""

    def __init__(
        self,
        records: RecordCache,
        presence: PresenceView,
        placements: Mapping[Slug, tuple[Placement, ...]],
        limits: Callable[[], Limits],
    ) -> None:
        self._records, self._presence = records, presence
        self._placements, self._limits = placements, limits

    def unready(self) -> int:
        """As `AgentReadiness`."""
        paused = self._presence.paused()
        return sum(
            record.presence is Presence.PRESENT
            and slug not in paused
            and not self.has_ready_agent(slug)
            for slug, record in self._records.items()
        )

    def has_ready_agent(self, slug: Slug) -> bool:
        """As `AgentReadiness`."""
        record = self._records.get(slug)
        return record is not None and any(
            one.epoch == record.epoch
            and one.state is PlacementState.RUNNING
            and one.ready is not False
            for one in self._placements.get(slug, ())
        )

    def is_stuck(self, slug: Slug) -> bool:
        """As `AgentReadiness`: its scheduler restarts it again and again."""
        return any(
            one.state is PlacementState.RESTARTING
            and one.restarts >= self._limits().crash_loop_restarts
            for one in self._placements.get(slug, ())
        )
