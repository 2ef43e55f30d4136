"""Detects a list that lacks placements which still exist, by comparison with earlier snapshots (S7)."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Placement, PlacementState

MAX_CHECKED: Final = 8
"""Maximum number of missing placements that are read one by one. One that exists proves that the list is wrong."""


@dataclass(slots=True)
class Vanished:
    """The references of the live placements in the last snapshots."""

    _live: dict[Slug, tuple[str, ...]] = field(default_factory=dict)

    def vanished(self, listed: AbstractSet[str], only: AbstractSet[Slug] | None) -> list[str]:
        """Up to MAX_CHECKED placements that were live and are no longer listed; the caller reads each of them."""
        slugs: Iterable[Slug] = self._live if only is None else only & self._live.keys()
        gone = [ref for slug in slugs for ref in self._live[slug] if ref not in listed]
        return gone if len(gone) <= MAX_CHECKED else random.sample(gone, MAX_CHECKED)

    def remember(
        self,
        placements: Mapping[Slug, Collection[Placement]],
        only: AbstractSet[Slug] | None,
    ) -> None:
        """Remember what a plausible snapshot shows."""
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

    def live(self, slug: Slug) -> tuple[str, ...]:
        """References of a device's live placements, as last listed."""
        return self._live.get(slug, ())
