"""Whether Nomad's lists may be believed: an agent that runs does not leave them without a trace.

A list can answer 200 and leave jobs out (a proxy, a bug, a lost page). Taken at its word, it would have
us start a second agent beside each that it hides (S3): a missing agent needs no breaker.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Placement, PlacementState
from nomad_watchdog.schedulers._nomad_view import Row

MOST_ASKED: Final = 8
"""So many of the jobs that vanished are asked for by name; a list that lies is caught by the first."""


def unlisted(listed: AbstractSet[str], allocs: Iterable[Row], index: int) -> set[str]:
    """Jobs with a running allocation that the list of jobs, read before at `index`, leaves out."""
    return {
        one["JobID"]
        for one in allocs
        if one["JobID"] not in listed
        and one["ClientStatus"] == "running"
        and one.get("DesiredStatus") == "run"
        and one.get("CreateIndex", index) < index
    }


@dataclass(slots=True)
class Memory:
    """The jobs that were alive in the last snapshots."""

    _live: dict[Slug, tuple[str, ...]] = field(default_factory=dict)

    def vanished(self, listed: AbstractSet[str], only: AbstractSet[Slug] | None) -> list[str]:
        """A few of those that were alive and are listed no more. Nomad forgets a live job only when
        somebody purges it, so each is worth a question."""
        slugs: Iterable[Slug] = self._live if only is None else only & self._live.keys()
        gone = [ref for slug in slugs for ref in self._live[slug] if ref not in listed]
        return gone if len(gone) <= MOST_ASKED else random.sample(gone, MOST_ASKED)

    def take(
        self,
        placements: Mapping[Slug, Collection[Placement]],
        only: AbstractSet[Slug] | None,
    ) -> None:
        """Remember what a believed snapshot shows."""
        slugs: Collection[Slug] = placements.keys() if only is None else only
        if only is None:
            self._live.clear()
        for slug in slugs:
            live = tuple(
                one.ref for one in placements.get(slug, ()) if one.state is not PlacementState.DEAD
            )
            if live:
                self._live[slug] = live
            else:
                self._live.pop(slug, None)
