"""When the record of a device that has left may be deleted, and how its epochs are kept from being used again.

A tombstone keeps the epoch of its device. When it is deleted, the floor replaces it: one number for the whole
registry, the highest epoch (and generation) of any deleted tombstone. A device that is registered without a record
gets its first epoch above the floor, so that no earlier agent can carry it.

The order makes this safe, with any number of writers and without a transaction over two keys: the floor is raised
before a tombstone is deleted, and a replica that starts the first agent of a record reads the floor after the record.
The record can only have been created after the deletion, so this read returns the raised floor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import NEVER, DeviceRecord, Epoch, Presence, WallTime


@dataclass(frozen=True, slots=True)
class EpochFloor:
    """Highest epoch and generation of deleted records; those of new records are above it."""

    epoch: Epoch = NEVER
    generation: int = 0

    def over(self, records: Iterable[DeviceRecord]) -> EpochFloor:
        """The floor to set before these tombstones are deleted."""
        epoch, generation = self.epoch, self.generation
        for record in records:
            epoch = max(epoch, record.epoch)
            generation = max(generation, record.generation)
        return EpochFloor(epoch, generation)

    def first(self, record: DeviceRecord, wanted: Epoch) -> Epoch:
        """The epoch to use for a record instead of `wanted`: its first one is above the floor."""
        return wanted if record.epoch != NEVER else max(wanted, Epoch(self.epoch + 1))

    def freed(self, stored: DeviceRecord | None, saved: DeviceRecord) -> DeviceRecord:
        """The record that a backup may restore: without its epoch if a higher one may have been used and deleted
        since."""
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
    """The tombstones that may be deleted, at most `most`: the device left at least `ttl_s` seconds ago and is not in
    `listed`, the devices of which the scheduler lists a placement that may have a process."""
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
