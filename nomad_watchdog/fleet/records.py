"""The registry's records as this control plane knows them, and the only way to change them durably.

A change is written to the registry first and acknowledged when it is durable (S4). The copy in memory may be
behind: a change that is based on an old record loses its compare-and-set, and the record is read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import (
    Callable,
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from dataclasses import dataclass
from typing import TypeVar, overload

from nomad_watchdog import failpoints
from nomad_watchdog.clock import Clock, steps
from nomad_watchdog.core import event_order, presence, registry_rollback
from nomad_watchdog.core.registry_rollback import RegistryRollback
from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.errors import (
    ConflictError,
    DamagedError,
    TransientError,
    UserError,
    WatchdogError,
)
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import Departure, Device, DeviceRecord, Presence, WallTime
from nomad_watchdog.registry import (
    COMMIT_TRIES,
    CommitGuard,
    Registry,
    RegistrySnapshot,
)
from nomad_watchdog.registry.epoch_floor import FLOOR, floor_of, raise_floor
from nomad_watchdog.signals import Signal

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Registered:
    """The stored record, and whether this call changed it (S5)."""

    record: DeviceRecord
    changed: bool
    written: bool = False
    """It was stored, at least to remember when its last event was signed (`core.event_order`)."""


RecordChange = tuple[DeviceRecord | None, DeviceRecord]
"""A record before (None: it was not known) and now."""


def _permit_all(_device: Device) -> None:
    """The permit of a caller that may change every device."""


class RecordCache(Mapping[Slug, DeviceRecord]):
    """Slug → record, kept in step with a registry."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self.registry = registry
        self.clock = clock
        self._records: dict[Slug, DeviceRecord] = {}
        self.slug_by_id: dict[str, Slug] = {}
        """By device ID: a known ID need not be checked and hashed again."""
        self.version = 0
        """Increases whenever a record changes."""
        self.loaded = False
        """The registry has been read completely at least once."""
        self.index = 0
        """The registry's index of the last complete snapshot."""
        self.reached = 0
        """The highest index that the registry has returned, for writes too. A read that begins now and returns
        a lower one comes from a store that was restored from a backup."""
        self.unreadable: frozenset[Slug] = frozenset()
        """Devices whose record could not be decoded in that snapshot."""
        self.vanished: tuple[DeviceRecord, ...] = ()
        """Records of present devices that were known and that snapshot lacks. No replica deletes those, and a
        truncated answer cannot be told from a complete one by its index: the registry must be read again."""
        self.setback: RegistryRollback | None = None
        """What that snapshot took back, because the registry went back in time; None = nothing."""
        self.floor = EpochFloor()
        """As last read. Sufficient for generations; an epoch needs a fresh read (`read_floor`)."""
        self.owned: Counter[str] = Counter()
        """Source → number of its records, tombstones included."""
        self.changed: Signal[[Sequence[RecordChange]]] = Signal()
        """Records were stored or read."""
        self.forgotten: Signal[[Sequence[Slug]]] = Signal()
        """The registry no longer has a record for these devices."""
        self.committed: Signal[[str, int]] = Signal()
        """A write has ended: its outcome (`stored`, `conflict` or `error`) and the number of records."""

    def __getitem__(self, slug: Slug) -> DeviceRecord:
        return self._records[slug]

    def __iter__(self) -> Iterator[Slug]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, slug: object) -> bool:
        return slug in self._records

    # Mapping's own `get` and views call __getitem__ for each record: too slow for 100,000 devices.
    @overload
    def get(self, slug: Slug, /) -> DeviceRecord | None: ...
    @overload
    def get(self, slug: Slug, /, default: DeviceRecord | T) -> DeviceRecord | T: ...
    def get(self, slug: Slug, /, default: T | None = None) -> DeviceRecord | T | None:
        """The record of a device, or the default."""
        return self._records.get(slug, default)

    def keys(self) -> KeysView[Slug]:
        """The devices."""
        return self._records.keys()

    def values(self) -> ValuesView[DeviceRecord]:
        """The records."""
        return self._records.values()

    def items(self) -> ItemsView[Slug, DeviceRecord]:
        """Devices and records."""
        return self._records.items()

    def check_loaded(self) -> None:
        """Raises TransientError until the registry has been read: before that no device is known, and none
        is known to be missing."""
        if not self.loaded:
            raise TransientError("the registry has not been read yet", retry_after_s=1.0)

    async def register(
        self,
        devices: Sequence[Device],
        source: str | None = None,
        *,
        event: event_order.SignedEvent | None = None,
        permit: Callable[[Device], None] = _permit_all,
        token: str = "",
    ) -> list[Registered]:
        """Register these devices or change them. Durable when it returns (S4), idempotent (S5).

        `source`: the inventory that lists them, None = the API. `token`: the device token of the caller, if it
        has one. `event`: the signed event of the request. `permit` is called with each requested and each stored
        device, also one that has left, and raises what it likes; after a lost compare-and-set it is called again.

        Raises OutOfDateError for an event that is out of date, UserError for a device ID whose slug belongs to
        another ID, ConflictError when other writers won COMMIT_TRIES times in a row, and what the registry
        raises.
        """
        requested = {slug_of(device.id): device for device in devices}
        now = self.clock.wall()

        def change(slug: Slug, stored: DeviceRecord | None) -> DeviceRecord | None:
            device = requested[slug]
            if stored is not None and stored.device.id != device.id:
                raise UserError(f"{device.id!r} has the same slug as {stored.device.id!r}")
            permit(device)
            if stored is not None:
                permit(stored.device)
            wanted = presence.register(
                stored, device, now, source, token=token, generation=self.floor.generation
            )
            return event_order.stamp(stored, wanted, event, now)

        outcome = await self._change(list(requested), change)
        return [found for slug in requested if (found := outcome[slug]) is not None]

    async def deregister(
        self,
        ids: Sequence[DeviceId],
        left: Departure = Departure.REMOVED,
        *,
        event: event_order.SignedEvent | None = None,
        permit: Callable[[Device], None] = _permit_all,
    ) -> list[Registered | None]:
        """Record that these devices have left; None for one that was never registered. `event`, `permit` and
        exceptions: as `register`."""
        now = self.clock.wall()
        slugs = [slug_of(device_id) for device_id in ids]

        def change(_slug: Slug, stored: DeviceRecord | None) -> DeviceRecord | None:
            if stored is not None:
                permit(stored.device)
            wanted = presence.deregister(stored, now, left) if stored is not None else None
            return event_order.stamp(stored, wanted, event, now)

        outcome = await self._change(slugs, change)
        return [outcome[slug] for slug in slugs]

    async def adjust(
        self,
        slugs: Sequence[Slug],
        change: Callable[[DeviceRecord, WallTime], DeviceRecord | None],
    ) -> int:
        """Change these records where `change` returns another one; the number of changed records. After a lost
        compare-and-set `change` is called again. Raises as `register`."""
        now = self.clock.wall()

        def stamped(_slug: Slug, stored: DeviceRecord | None) -> DeviceRecord | None:
            wanted = change(stored, now) if stored is not None else None
            return None if wanted is None else event_order.stamp(stored, wanted, None, now)

        outcome = await self._change(slugs, stamped)
        return sum(done is not None and done.changed for done in outcome.values())

    async def _change(
        self,
        slugs: Sequence[Slug],
        change: Callable[[Slug, DeviceRecord | None], DeviceRecord | None],
    ) -> dict[Slug, Registered | None]:
        outcome: dict[Slug, Registered | None] = {}
        failpoints.reached("K1")
        todo = list(dict.fromkeys(slugs))
        # The cache may be behind, never wrong: a stale guess loses its compare-and-set and is read.
        stored = {slug: self.get(slug) for slug in todo}
        for _ in range(COMMIT_TRIES):
            wanted = {
                slug: change(slug, stored[slug]) async for some in steps(todo) for slug in some
            }
            writes = {slug: record for slug, record in wanted.items() if record is not None}
            for slug in todo:
                if slug not in writes and await self._is_stored(slug, stored[slug]):
                    outcome[slug] = _unchanged(stored[slug])
            results = await self.commit(list(writes.values())) if writes else ()
            failpoints.reached("K2")
            done = [record for record in results if record is not None]
            for record in done:
                changed = not event_order.is_mark_only(stored[record.slug], record)
                outcome[record.slug] = Registered(record, changed=changed, written=True)
            async for some in steps(done):
                self.learn(some)
            todo = [slug for slug in todo if slug not in outcome]
            if not todo:
                return outcome
            stored = {slug: await self.registry.get(slug) for slug in todo}
        raise ConflictError(f"{len(todo)} records are being changed by others; try again")

    async def commit(
        self, records: Sequence[DeviceRecord], guards: Sequence[CommitGuard] = ()
    ) -> Sequence[DeviceRecord | None]:
        """As `Registry.commit`, counted."""
        try:
            stored = await self.registry.commit(records, guards)
        except WatchdogError:
            self.committed.emit("error", len(records))
            raise
        lost = sum(record is None for record in stored)
        self.committed.emit("stored", len(records) - lost)
        self.committed.emit("conflict", lost)
        return stored

    async def _is_stored(self, slug: Slug, known: DeviceRecord | None) -> bool:
        """Whether the registry has this record now. If the cache is behind, "nothing to do" would acknowledge what is
        not stored (S4)."""
        fresh = await self.registry.get(slug)
        if fresh is not None and fresh != known:
            self.learn([fresh])
        return fresh == known

    async def read_floor(self) -> EpochFloor:
        """The floor that every first epoch must be above, as the registry has it now."""
        self.floor = floor_of(await self.registry.document(FLOOR))
        return self.floor

    async def try_floor(self) -> EpochFloor | DamagedError:
        """As `read_floor`; a damaged floor is returned, not raised: it only blocks first starts (S9)."""
        try:
            return await self.read_floor()
        except DamagedError as error:
            return error

    async def forget(self, tombstones: Sequence[DeviceRecord]) -> int:
        """Delete these tombstones; the number of deleted ones. The floor is raised first, so that their epochs are
        never used again (`core.tombstones`). Raises as `Registry.forget`."""
        if not tombstones or not await raise_floor(self.registry, EpochFloor().over(tombstones)):
            return 0
        await self.read_floor()
        gone = await self.registry.forget(tombstones)
        # A device that was registered again meanwhile has a higher index.
        slugs = [
            record.slug
            for record, won in zip(tombstones, gone, strict=True)
            if won and self._records.get(record.slug, record).index == record.index
        ]
        for slug in slugs:
            record = self._records.pop(slug, None)
            if record is not None:
                self.owned[record.source] -= 1
        self._forget(slugs)
        return len(slugs)

    def _forget(self, slugs: Sequence[Slug]) -> None:
        if not slugs:
            return
        self.version += 1
        gone = set(slugs)
        self.slug_by_id = {name: slug for name, slug in self.slug_by_id.items() if slug not in gone}
        self.forgotten.emit(slugs)

    async def reread(self) -> RegistrySnapshot | None:
        """Read the whole registry; None when a newer snapshot arrived during the read.

        A lower index means a restored store only if it is lower than the index known when the read began.
        Otherwise the answer is merely late, and applying it would forget newer changes (S8)."""
        known, reached = self.index, self.reached
        snapshot = await self.registry.read()
        if snapshot.index < reached:
            self.index = max(self.index, reached)  # and so it went backwards, for `reset` too
            return snapshot
        return None if known <= snapshot.index < self.index else snapshot

    def learn(self, records: Sequence[DeviceRecord]) -> bool:
        """Apply records that are known to be stored, including our own writes (S8); whether any is new."""
        news = []
        for record in records:
            before = self._records.get(record.slug)
            if before is None or before.index < record.index:
                self._records[record.slug] = record
                self.slug_by_id[record.device.id] = record.slug
                self.owned[record.source] += 1
                if before is not None:
                    self.owned[before.source] -= 1
                self.reached = max(self.reached, record.index)
                news.append((before, record))
        if news:
            self.version += 1
            self.changed.emit(news)
        return bool(news)

    def reset(
        self,
        records: Mapping[Slug, DeviceRecord],
        index: int,
        unreadable: frozenset[Slug] = frozenset(),
    ) -> bool:
        """Apply a complete snapshot of the registry, except where our own writes are newer; whether anything
        changed."""
        fresh = dict(records)
        for slug, ours in self._records.items():
            theirs = fresh.get(slug)
            # Our own write is newer than this snapshot: keep it (S8). A lower index means a restored or
            # wiped store, which takes precedence.
            if ours.index > index >= self.index and (theirs is None or theirs.index < ours.index):
                fresh[slug] = ours
        news = self.learn([r for slug, r in fresh.items() if self._records.get(slug) is not r])
        gone = [slug for slug in self._records if slug not in fresh]
        self.setback = registry_rollback.of(self._records, fresh, self.index, index)
        # A tombstone that is gone was deleted by another replica.
        left = (self._records[slug] for slug in gone)
        self.vanished = tuple(one for one in left if one.presence is Presence.PRESENT)
        self.reached = index if index < self.index else max(self.reached, index)
        self._records = fresh
        self.version += 1  # a restored store changes records without announcing each
        if gone or self.setback is not None:
            self.owned = Counter(record.source for record in fresh.values())
        self.index = index
        self.unreadable = unreadable
        self._forget(gone)
        self.loaded = True
        return news or bool(gone) or self.setback is not None


def _unchanged(record: DeviceRecord | None) -> Registered | None:
    return None if record is None else Registered(record, changed=False)
