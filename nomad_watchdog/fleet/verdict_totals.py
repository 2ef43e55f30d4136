"""Numbers over all devices, as last judged: kept current, so that reading them takes constant time."""

from __future__ import annotations

from collections import Counter

from nomad_watchdog.fleet.track import Track
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Unheard, VerdictState


class VerdictTotals:
    """Counts what the tracks of all devices contain. A track is discounted before it changes, and counted after."""

    def __init__(self) -> None:
        self.by_state: Counter[VerdictState] = Counter()
        self.unheard: Counter[Unheard] = Counter()
        self.unlisted = 0
        """Devices whose agent reports and is not known to its scheduler."""
        self.settled = 0
        """Devices without a missing agent."""
        self.silent: set[Slug] = set()
        """Devices whose agent runs, has had its time, and of which no report arrives."""

    def count(self, slug: Slug, track: Track) -> None:
        """Include what this track contains now."""
        self._add(track, 1)
        if track.unheard is Unheard.SILENT:
            self.silent.add(slug)

    def discount(self, slug: Slug, track: Track) -> None:
        """Exclude what this track contains now."""
        self._add(track, -1)
        if track.unheard is Unheard.SILENT:
            self.silent.discard(slug)

    def _add(self, track: Track, step: int) -> None:
        if track.state is not None:
            self.by_state[track.state] += step
        if track.unheard is not None:
            self.unheard[track.unheard] += step
        self.unlisted += step * track.unlisted
        self.settled += step * track.settled
