"""S8 between the two stores: an agent counts as gone only on a listing that is younger than the record.

The registry and the scheduler are watched apart from each other, so either view may be the older one. A
record that has just got an epoch or an instance, by our hand or another replica's, tells of a placement
that our last listing may be too old to show. Taking that for «gone» would start a second process beside
a live one (S3); so a start waits for a listing that was begun after the record was known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Epoch

_MAX_RIVALS: Final = 10_000


class ListingFreshness:
    """Which devices' placements have not been listed since their record last changed.

    Listings are read one at a time (`PlacementInformer`), so that they come in the order in which they were
    begun."""

    def __init__(self) -> None:
        self._known: dict[Slug, tuple[Epoch, str]] = {}
        self._unseen: dict[Slug, int] = {}
        self._rivals: set[tuple[Slug, str]] = set()
        self._listing = 0

    def learned(self, records: Iterable[DeviceRecord]) -> set[Slug]:
        """Take records; those whose placements must be listed before an agent of theirs counts as
        gone."""
        news = set()
        for record in records:
            facts = (record.epoch, record.instance)
            if record.epoch and self._known.get(record.slug) != facts:
                self._unseen[record.slug] = self._listing
                news.add(record.slug)
            self._known[record.slug] = facts
        return news

    def begins(self) -> None:
        """A listing is about to be asked for."""
        self._listing += 1

    def listed(self, only: Collection[Slug] | None) -> None:
        """The listing that was begun last has come; `only` as in a snapshot."""
        for slug in list(self._unseen) if only is None else only:
            if self._unseen.get(slug, self._listing) < self._listing:
                del self._unseen[slug]

    def is_behind(self, slug: Slug) -> bool:
        """Whether the placements of a device were last listed before its record was known."""
        return slug in self._unseen

    def rivals(self, slug: Slug, instance: str) -> bool:
        """Another instance than the accepted one reports; whether it is the first time. Then what was listed
        may be older than the start of it, and the device is behind until it is listed anew."""
        if (slug, instance) in self._rivals:
            return False
        if len(self._rivals) >= _MAX_RIVALS:
            self._rivals.clear()
        self._rivals.add((slug, instance))
        self._unseen[slug] = self._listing
        return True

    def premature(self, action: Action) -> bool:
        """Whether the action takes an agent for gone that a younger listing may show.

        A start at the record's own epoch may be, too: a replacement commits the next epoch before the old
        agent is asked to stop, and that may be running without being listed."""
        return action.kind is ActionKind.START and self.is_behind(action.slug)

    def forget(self, kept: Collection[Slug]) -> None:
        """Drop what is known of devices that are not in `kept`."""
        for slug in self._known.keys() - kept:
            del self._known[slug]
            self._unseen.pop(slug, None)
