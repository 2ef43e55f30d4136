"""Conditions of devices on their way into the registry (`conditions` writes them)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from nomad_watchdog.core import device_condition as rules
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Condition, DeviceRecord, Monotonic


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A condition to be stored, since when, and the stored one that it takes the place of."""

    condition: Condition | None
    at: Monotonic
    instead_of: Condition | None


@dataclass(slots=True)
class PendingConditions:
    """Conditions that are not in the registry yet, by device."""

    news: asyncio.Event = field(default_factory=asyncio.Event)
    _wanted: dict[Slug, _Wanted] = field(default_factory=dict)
    _parked: dict[Slug, int] = field(default_factory=dict)
    """Index of records that can't hold their condition."""
    _under_way: dict[Slug, Condition | None] = field(default_factory=dict)
    """What is being stored right now."""

    def of(self, record: DeviceRecord) -> Condition | None:
        """The condition of a device: as it is wanted, else as it is stored."""
        wanted = self._wanted.get(record.slug)
        return record.condition if wanted is None else wanted.condition

    def write(
        self,
        record: DeviceRecord,
        wanted: Condition | None,
        now: Monotonic,
        *,
        renewed: bool = False,
    ) -> None:
        """Have this condition stored; `record` is the one that is stored now. `renewed`: it is the same
        condition with a new reason; without that two of one state need no write."""
        settled = record.slug not in self._under_way
        if settled and not renewed and rules.same(record.condition, wanted):
            self.forget(record.slug)
            return
        self._wanted[record.slug] = _Wanted(wanted, now, record.condition)
        if self._parked.get(record.slug) != record.index:
            self._parked.pop(record.slug, None)
            self.news.set()

    def park(self, record: DeviceRecord) -> None:
        """Try no more to store what is wanted of this record, until it is another one."""
        self._parked[record.slug] = record.index

    @contextmanager
    def writing(self, records: Sequence[DeviceRecord]) -> Iterator[None]:
        """These are being stored as long as this lasts. What is reported meanwhile is newer."""
        self._under_way |= {record.slug: record.condition for record in records}
        try:
            yield
        finally:
            for record in records:
                self._under_way.pop(record.slug, None)

    def is_ours(self, record: DeviceRecord) -> bool:
        """Whether a record that was read or stored says what we are just storing."""
        slug = record.slug
        return slug in self._under_way and self._under_way[slug] == record.condition

    def stored(self, record: DeviceRecord) -> None:
        """Take a record that was read or stored: what it says need not be written, and what another writer
        has changed meanwhile is decided anew, by the next report."""
        wanted = self._wanted.get(record.slug)
        if wanted is None or record.condition == wanted.instead_of:
            return
        if self.is_ours(record) and wanted.condition != record.condition:
            self._wanted[record.slug] = replace(wanted, instead_of=record.condition)
            self.news.set()
        else:
            self.forget(record.slug)

    def forget(self, slug: Slug) -> None:
        """Nothing is to be written."""
        self._wanted.pop(slug, None)
        self._parked.pop(slug, None)

    def forget_before(self, then: Monotonic, slugs: Sequence[Slug]) -> None:
        """Of these devices, forget what was wanted before `then`: whoever may write knows better by now."""
        for slug in slugs:
            if self._wanted[slug].at < then:
                self.forget(slug)

    def slugs(self) -> list[Slug]:
        """The devices of which something is to be written."""
        return [slug for slug in self._wanted if slug not in self._parked]
