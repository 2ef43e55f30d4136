"""When the record of a device that has left may be deleted, and what keeps its epochs from coming again.

A tombstone keeps the epoch of its device. When it is deleted, the floor takes its place: one number for the
whole registry, the highest epoch (and generation) of any deleted tombstone. A device that is registered without
a record gets its first epoch above the floor, so that no agent of an earlier life can carry it.

The order makes it safe, with any number of writers and without a transaction over two keys: the floor is raised
before a tombstone is deleted, and whoever starts the first agent of a record reads the floor after the record
is known. The record could only be created after the deletion, so that this read shows the raised floor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import NEVER, DeviceRecord, Epoch, Presence, WallTime


@dataclass(frozen=True, slots=True)
class EpochFloor:
    """What no new record may go below."""

    epoch: Epoch = NEVER
    generation: int = 0

    def over(self, records: Iterable[DeviceRecord]) -> EpochFloor:
        """The floor that lets these tombstones be deleted."""
        epoch, generation = self.epoch, self.generation
        for record in records:
            epoch = max(epoch, record.epoch)
            generation = max(generation, record.generation)
        return EpochFloor(epoch, generation)

    def first(self, record: DeviceRecord, wanted: Epoch) -> Epoch:
        """The epoch to take for a record instead of `wanted`: its first one is above the floor."""
        return wanted if record.epoch != NEVER else max(wanted, Epoch(self.epoch + 1))

    def freed(self, stored: DeviceRecord | None, saved: DeviceRecord) -> DeviceRecord:
        """What a backup may bring back: without an epoch if one above it may have been given and forgotten since."""
        if (stored is None or stored.epoch == NEVER) and NEVER < saved.epoch <= self.epoch:
            return replace(saved, epoch=NEVER, instance="")
        return saved


def expired(
    records: Iterable[DeviceRecord],
    listed: Collection[Slug],
    now: WallTime,
    ttl_s: float,
    most: int,
) -> list[DeviceRecord]:
    """The tombstones that may be deleted, at most `most`: left at least `ttl_s` seconds ago, and the scheduler
    lists (`listed`) no placement of the device that may have a process."""
    found: list[DeviceRecord] = []
    for record in records:
        if (
            record.presence is Presence.ABSENT
            and now - record.changed_at >= ttl_s
            and record.slug not in listed
        ):
            found.append(record)
            if len(found) == most:
                break
    return found
