"""The registry's records as we know them, and the one durable way to change them.

A wish goes to the registry first and is acknowledged only when it is durable (S4). What is in memory may
be behind, never wrong: a guess from it loses its compare-and-set and is read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nomad_watchdog import failpoints
from nomad_watchdog.clock import Clock, steps
from nomad_watchdog.core import event_order, presence, registry_rollback
from nomad_watchdog.core.registry_rollback import RegistryRollback
from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.errors import ConflictError, DamagedError, UserError, WatchdogError
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import Departure, Device, DeviceRecord, Presence, WallTime
from nomad_watchdog.registry import (
    COMMIT_TRIES,
    CommitGuard,
    Registry,
    RegistrySnapshot,
)
from nomad_watchdog.registry.epoch_floor import FLOOR, floor_of, raise_floor


@dataclass(frozen=True, slots=True)
class Registered:
    """The stored record, and whether this call changed it (S5)."""

    record: DeviceRecord
    changed: bool
    written: bool = False
    """It was stored, at least to remember when its last event was signed (`core.event_order`)."""


def _anything(_device: Device) -> None:
    """The permit of those who may change every device."""


class RecordCache:
    """Records by slug, kept in step with a registry."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self.registry = registry
        self.clock = clock
        self.records: dict[Slug, DeviceRecord] = {}
        self.index = 0
        """The registry's index at the last snapshot of it."""
        self.reached = 0
        """The highest index that the registry has shown us, our own writes included: a read that is begun
        now and answers with less comes from a store that was put back."""
        self.unreadable: frozenset[Slug] = frozenset()
        """Devices whose record could not be decoded in that snapshot."""
        self.vanished: tuple[DeviceRecord, ...] = ()
        """Records of present devices that we knew and that snapshot left out. No replica deletes those, and an answer that was cut short has an index as good as any: it is to be read again."""
        self.setback: RegistryRollback | None = None
        """What that snapshot took back, because the registry went back in time; None = nothing."""
        self.floor = EpochFloor()
        """As it was last read. Good for generations; an epoch needs a fresh read (`read_floor`)."""
        self.owned: Counter[str] = Counter()
        """Source → its records, tombstones included."""
        self.on_commit: Callable[[str, int], None] = lambda _outcome, _count: None

    def learned(self, news: Sequence[tuple[DeviceRecord | None, DeviceRecord]]) -> None:
        """Called with (before, now) of each record that was stored or read; for subclasses."""

    def forgotten(self, slugs: Sequence[Slug]) -> None:
        """Called with those whose record the registry no longer has; for subclasses."""

    async def register(
        self,
        devices: Sequence[Device],
        source: str | None = None,
        *,
        event: event_order.SignedEvent | None = None,
        permit: Callable[[Device], None] = _anything,
        token: str = "",
    ) -> list[Registered]:
        """Ask for these devices to be watched. Durable when it returns (S4), idempotent (S5).
        `source`: the inventory that asks, None = the API. `token`: the device token that asks, if it is one.

        `event`: the signed event that says so. Raises OutOfDateError for one that is over, UserError for a device id whose slug belongs to another id, ConflictError when other
        writers won COMMIT_TRIES times in a row, and what the registry raises.

        `permit` is asked about each wish and each device that is stored, also one that has left, and
        raises what it likes. Who asked too little because of an old cache loses the compare-and-set, and is
        asked again.
        """
        wishes = {slug_of(device.id): device for device in devices}
        now = self.clock.wall()

        def change(slug: Slug, stored: DeviceRecord | None) -> DeviceRecord | None:
            wish = wishes[slug]
            if stored is not None and stored.device.id != wish.id:
                raise UserError(f"{wish.id!r} has the same slug as {stored.device.id!r}")
            permit(wish)
            if stored is not None:
                permit(stored.device)
            wanted = presence.register(
                stored, wish, now, source, token=token, generation=self.floor.generation
            )
            return event_order.stamp(stored, wanted, event, now)

        outcome = await self._change(list(wishes), change)
        return [found for slug in wishes if (found := outcome[slug]) is not None]

    async def deregister(
        self,
        ids: Sequence[DeviceId],
        left: Departure = Departure.REMOVED,
        *,
        event: event_order.SignedEvent | None = None,
        permit: Callable[[Device], None] = _anything,
    ) -> list[Registered | None]:
        """Say that these devices have left; None for one that was never registered. `event` and `permit`:
        as above."""
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
        """Change these records where `change` gives another one; how many it did. It may be asked
        again when a compare-and-set lost. Raises as `register`."""
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
        stored = {slug: self.records.get(slug) for slug in todo}
        for _ in range(COMMIT_TRIES):
            wanted = {
                slug: change(slug, stored[slug]) async for some in steps(todo) for slug in some
            }
            writes = {slug: record for slug, record in wanted.items() if record is not None}
            for slug in todo:
                if slug not in writes:
                    outcome[slug] = await self._unchanged(slug, stored[slug])
            todo = [slug for slug in todo if slug in writes or slug not in outcome]
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
            self.on_commit("error", len(records))
            raise
        lost = sum(record is None for record in stored)
        self.on_commit("stored", len(records) - lost)
        self.on_commit("conflict", lost)
        return stored

    async def _unchanged(self, slug: Slug, stored: DeviceRecord | None) -> Registered | None:
        # «Nothing to do» from a cache that is behind would acknowledge what is not stored (S4).
        fresh = await self.registry.get(slug)
        if fresh == stored:
            return None if fresh is None else Registered(fresh, changed=False)
        if fresh is not None:
            self.learn([fresh])
        raise ConflictError("the record has just been changed by another writer; try again")

    async def read_floor(self) -> EpochFloor:
        """The floor below which no first epoch may be, as the registry has it now."""
        self.floor = floor_of(await self.registry.document(FLOOR))
        return self.floor

    async def try_floor(self) -> EpochFloor | DamagedError:
        """As `read_floor`; a damaged one as a value: it stops the first starts, and nothing else (S9)."""
        try:
            return await self.read_floor()
        except DamagedError as error:
            return error

    async def forget(self, tombstones: Sequence[DeviceRecord]) -> int:
        """Delete these tombstones; how many it did. Their epochs do not come again: the floor is raised
        first (`core.tombstones`). Raises as `Registry.forget`."""
        if not tombstones or not await raise_floor(self.registry, EpochFloor().over(tombstones)):
            return 0
        await self.read_floor()
        gone = await self.registry.forget(tombstones)
        # One that was registered again meanwhile is known by a higher index.
        slugs = [
            record.slug
            for record, won in zip(tombstones, gone, strict=True)
            if won and self.records.get(record.slug, record).index == record.index
        ]
        for slug in slugs:
            record = self.records.pop(slug, None)
            if record is not None:
                self.owned[record.source] -= 1
        if slugs:
            self.forgotten(slugs)
        return len(slugs)

    async def reread(self) -> RegistrySnapshot | None:
        """Everything, read anew; None when the answer was overtaken on its way: what we know is newer.

        An index that went backwards means a restored store only if it is behind what was known when the
        read began. An overtaken answer looks the same, and taking it would forget what came meanwhile,
        until the store changes again (S8)."""
        known, reached = self.index, self.reached
        snapshot = await self.registry.read()
        if snapshot.index < reached:
            self.index = max(self.index, reached)  # and so it went backwards, for `reset` too
            return snapshot
        return None if known <= snapshot.index < self.index else snapshot

    def learn(self, records: Sequence[DeviceRecord]) -> bool:
        """Take records that are known to be stored (our own writes included: S8); whether any was
        news."""
        news = []
        for record in records:
            before = self.records.get(record.slug)
            if before is None or before.index < record.index:
                self.records[record.slug] = record
                self.owned[record.source] += 1
                if before is not None:
                    self.owned[before.source] -= 1
                self.reached = max(self.reached, record.index)
                news.append((before, record))
        if news:
            self.learned(news)
        return bool(news)

    def reset(
        self,
        records: Mapping[Slug, DeviceRecord],
        index: int,
        unreadable: frozenset[Slug] = frozenset(),
    ) -> bool:
        """Take a whole snapshot of the registry, unless our own writes are newer in a record; whether
        it told anything new."""
        fresh = dict(records)
        for slug, ours in self.records.items():
            theirs = fresh.get(slug)
            # Our own write is newer than this snapshot: keep it (S8). An index that went backwards
            # means a restored or wiped store, and then the store's word stands.
            if ours.index > index >= self.index and (theirs is None or theirs.index < ours.index):
                fresh[slug] = ours
        news = self.learn([r for slug, r in fresh.items() if self.records.get(slug) is not r])
        gone = [slug for slug in self.records if slug not in fresh]
        self.setback = registry_rollback.of(self.records, fresh, self.index, index)
        # A tombstone that is gone was deleted by another replica.
        left = (self.records[slug] for slug in gone)
        self.vanished = tuple(one for one in left if one.presence is Presence.PRESENT)
        self.reached = index if index < self.index else max(self.reached, index)
        self.records = fresh
        if gone or self.setback is not None:
            self.owned = Counter(record.source for record in fresh.values())
        self.index = index
        self.unreadable = unreadable
        if gone:
            self.forgotten(gone)
        return news or bool(gone) or self.setback is not None
