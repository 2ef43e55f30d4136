"""Numbers over all devices, as last judged: kept current, so that reading them takes constant time."""

from __future__ import annotations

from collections import Counter

from nomad_watchdog.fleet.track import Counted
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Unheard, VerdictState


class VerdictTotals:
    """Counts what the tracks of all devices contain."""

    def __init__(self) -> None:
        self.by_state: Counter[VerdictState] = Counter()
        self.unheard: Counter[Unheard] = Counter()
        self.unlisted = 0
        """Devices whose agent reports and is not known to its scheduler."""
        self.settled = 0
        """Devices without a missing agent."""
        self.silent: set[Slug] = set()
        """Devices whose agent runs, has had its time, and of which no report arrives."""

    def change(self, slug: Slug, before: Counted, after: Counted) -> None:
        """The track of a device was `before` and is `after` now. Most judgements change nothing."""
        if before == after:
            return
        for counted, step in ((before, -1), (after, 1)):
            if counted.state is not None:
                self.by_state[counted.state] += step
            if counted.unheard is not None:
                self.unheard[counted.unheard] += step
            self.unlisted += step * counted.unlisted
            self.settled += step * counted.settled
        if after.unheard is Unheard.SILENT:
            self.silent.add(slug)
        else:
            self.silent.discard(slug)
