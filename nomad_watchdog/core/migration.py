"""On which scheduler each device's agent lives, and where it moves in a migration.

The home of an epoch never changes: it is stored in the record by the same compare-and-set that raises the epoch (S2), so
that a crash, a late answer or a second replica can't start one epoch on two schedulers. Beside the records only the
requests are stored (`Migration`); the progress of a migration follows from the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.core.pauses import Target
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.ids import Shard, Slug, shard_of
from nomad_watchdog.model import (
    NEVER,
    DeviceRecord,
    Placement,
    PlacementState,
    Presence,
    WallTime,
)

Placements = Mapping[Slug, tuple[Placement, ...]]
_DEAD: Final = PlacementState.DEAD
_NOT_NOW: Final = (PlacementState.DEAD, PlacementState.STOPPING, PlacementState.LOST)


@dataclass(frozen=True, slots=True)
class Migration:
    """A request that the agents of some devices move to another scheduler. It stays in force when all have moved: a
    device that is registered later starts where the others are."""

    id: str
    source: str
    goal: str
    began: WallTime
    by: str
    target: Target | None = None
    """Which devices; None = all."""
    shards: frozenset[int] = frozenset()
    """The shards that move, out of `of_shards`; empty = all."""
    of_shards: int = 1
    at_once: int = 0
    """Maximum number of devices that move at a time; 0 = as many as a roll-out may replace."""
    back: bool = False
    """It is being undone, or was."""
    paused: bool = False
    done: bool = False

    @property
    def heads_for(self) -> str:
        return self.source if self.back else self.goal

    @property
    def leaves(self) -> str:
        return self.goal if self.back else self.source

    @property
    def is_whole(self) -> bool:
        """Whether it covers every device."""
        return self.target is None and not self.shards

    @property
    def state(self) -> str:
        """running, undoing, paused, done or undone."""
        if self.done:
            return "undone" if self.back else "done"
        if self.paused:
            return "paused"
        return "undoing" if self.back else "running"

    def covers(self, record: DeviceRecord) -> bool:
        """Whether it covers this device."""
        return (self.target is None or self.target.matches(record.device)) and (
            not self.shards or shard_of(record.slug, self.of_shards) in self.shards
        )


@dataclass(frozen=True, slots=True)
class BackendAssignment:
    """Where agents live and should live. `usual`: the configured backend, whose placements name no backend. `base`:
    where a record without a home is placed: the backend before the first migration. `is_open`: the schedulers that
    are listed."""

    usual: str
    base: str
    moves: tuple[Migration, ...] = ()
    is_open: frozenset[str] = frozenset()

    @property
    def active(self) -> Migration | None:
        """The migration in progress, paused or not."""
        return next((move for move in self.moves if not move.done), None)

    def of(self, record: DeviceRecord) -> str:
        """The home of the record's epoch."""
        return record.home or self.base

    def at(self, placement: Placement) -> str:
        """Where a placement is."""
        return placement.backend or self.usual

    def move_of(self, record: DeviceRecord) -> Migration | None:
        """The newest migration that covers this device."""
        return next((move for move in reversed(self.moves) if move.covers(record)), None)

    def goal(self, record: DeviceRecord) -> str:
        """The scheduler where the agent should be now."""
        here = self.of(record)
        move = self.move_of(record)
        if move is None or move.paused or here != move.leaves:
            return here
        return move.heads_for

    def for_start(self, record: DeviceRecord) -> str:
        """The scheduler where an agent starts for a device that has none.

        A device that was placed before stays where it is until its turn comes, so that many agents that end do not
        move many devices; unless the migration is complete."""
        move = self.move_of(record)
        if record.epoch == NEVER:
            if move is None:
                return self.usual
            return move.source if move.back or move.paused else move.goal
        here = self.of(record)
        if move is not None and move.done and here == move.leaves:
            return move.heads_for
        return here

    def is_at_goal(self, placement: Placement, record: DeviceRecord) -> bool:
        """Whether the placement is on the scheduler where the record's agent should be."""
        return self.at(placement) == self.goal(record)

    def is_known(self, record: DeviceRecord) -> bool:
        """Whether the scheduler of the record's agent is listed. If not, a migration has not been read yet, or a
        setting is missing."""
        return record.epoch == NEVER or self.of(record) in self.is_open

    def strangers(self, records: Mapping[Slug, DeviceRecord]) -> Iterator[Slug]:
        """Devices whose scheduler is not listed: nothing may be decided for them."""
        for slug, record in records.items():
            if not self.is_known(record):
                yield slug


class _NeverMigrated(BackendAssignment):
    """The assignment of a fleet that was never migrated: there is one scheduler, and records do not name it."""

    def of(self, record: DeviceRecord) -> str:  # noqa: ARG002  # as for any record
        return ""

    def is_at_goal(self, placement: Placement, record: DeviceRecord) -> bool:  # noqa: ARG002
        return True

    def is_known(self, record: DeviceRecord) -> bool:  # noqa: ARG002
        return True


NEVER_MIGRATED: Final = _NeverMigrated("", "")


@dataclass(frozen=True, slots=True)
class MigrationProgress:
    """Counts of devices that are present."""

    covered: int = 0
    there: int = 0
    """Number of covered devices whose agent's home is the destination."""
    on_way: int = 0
    """Number of these whose agent is not ready yet."""
    leftover: int = 0
    """Number of agents on the scheduler that the migration leaves, of devices that have moved or left."""

    @property
    def is_over(self) -> bool:
        """Every device has a ready agent at the destination, and no agent is left at the source."""
        return self.there == self.covered and not self.on_way and not self.leftover


def progress(
    move: Migration,
    homes: BackendAssignment,
    records: Mapping[Slug, DeviceRecord],
    placements: Placements,
    ready: Callable[[Slug], bool],
) -> MigrationProgress:
    """How far a migration has come. A device whose home is a third scheduler is not counted."""
    covered = there = on_way = leftover = 0
    for slug, record in records.items():
        if homes.move_of(record) is not move:
            continue
        present = record.presence is Presence.PRESENT
        if not present or homes.of(record) != move.leaves:
            leftover += sum(
                placement.state is not _DEAD and homes.at(placement) == move.leaves
                for placement in placements.get(slug, ())
            )
        if not present:
            continue
        here = homes.for_start(record) if record.epoch == NEVER else homes.of(record)
        covered += here in (move.heads_for, move.leaves)
        if here == move.heads_for:
            there += 1
            on_way += not ready(slug)
    return MigrationProgress(covered, there, on_way, leftover)


def frontier(
    homes: BackendAssignment,
    records: Mapping[Slug, DeviceRecord],
    placements: Placements,
    can: Callable[[DeviceRecord], bool],
    shard: Callable[[Slug], Shard],
) -> Shard | None:
    """The shard whose turn it is: the lowest one with a device that can move now; None = there is none. `can`:
    whether any action is allowed for a device; a device without must not block the others.

    Each replica moves only devices of its own shards. Moving shard by shard therefore also means replica by replica,
    so that all replicas together keep to one window."""
    found: Shard | None = None
    for slug, record in records.items():
        if (
            record.presence is Presence.PRESENT
            and homes.goal(record) != homes.of(record)
            and can(record)
            and (found is None or shard(slug) < found)
            and any(
                one.epoch == record.epoch and one.state not in _NOT_NOW
                for one in placements.get(slug, ())
            )
        ):
            found = shard(slug)
    return found


def tombs(
    move: Migration, homes: BackendAssignment, records: Mapping[Slug, DeviceRecord]
) -> Iterator[DeviceRecord]:
    """Records of devices that have left and would come back on the scheduler that the migration leaves."""
    for record in records.values():
        if (
            record.presence is Presence.ABSENT
            and record.epoch != NEVER
            and homes.of(record) == move.leaves
            and homes.move_of(record) is move
        ):
            yield record


def needed(
    homes: BackendAssignment, records: Mapping[Slug, DeviceRecord], placements: Placements
) -> frozenset[str]:
    """Schedulers that must be listed: where a device lives, has an agent left, or may get one. Tombstones count,
    because their devices can come back."""
    found = {homes.at(p) for some in placements.values() for p in some if p.state is not _DEAD}
    found |= {homes.of(record) for record in records.values() if record.epoch != NEVER}
    for move in homes.moves:
        found |= {move.heads_for} if move.done else {move.source, move.goal}
    return frozenset(found)


def begin(moves: Sequence[Migration], new: Migration) -> tuple[Migration, ...]:
    """The migrations with a new one. Raises ConflictError while another one is in progress."""
    for move in moves:
        if not move.done:
            raise ConflictError(
                f"a migration from {move.source} to {move.goal} is {move.state}; let it end, or undo it"
            )
    # An undone migration has changed nothing. One of the whole fleet replaces all earlier ones.
    return (*(m for m in moves if not m.back and not new.is_whole), new)
