"""Export of the registry to a file, and import: every record with its epoch, including tombstones.

The first line names the installation, so that a restored registry still owns the running agents, and two
installations are never mixed. Restoring never lowers an epoch (S1).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TextIO

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.core import presence
from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.errors import DamagedError, TransientError, UserError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Epoch
from nomad_watchdog.registry import Registry, RegistryDocument
from nomad_watchdog.registry.codec import MAX_BYTES, PoisonError, decode, encode
from nomad_watchdog.registry.epoch_floor import (
    FLOOR,
    floor_document,
    floor_of,
    raise_floor,
    rebuilt_floor,
)

FORMAT: Final = "nomad-watchdog registry"
VERSION: Final = 1
NO_FLOOR: Final = EpochFloor()
TRIES: Final = 5
"""Maximum number of rounds of compare-and-set in a restore."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did, or would do."""

    installation: str
    records: int
    changed: int
    rebuilt: bool = False
    """The registry's floor could not be read, and is written again."""


async def lines(registry: Registry) -> list[str]:
    """The whole registry, one record per line, in the order of the slugs."""
    installation = await registry.installation()
    snapshot = await registry.read()
    # After the records: what was deleted meanwhile is below it (`core.tombstones`).
    floor, _ = await _stored_floor(registry, snapshot.records.values())
    if registry.poisoned:
        key, why = next(iter(registry.poisoned.items()))
        raise UserError(
            f"{len(registry.poisoned)} records can't be read and would be missing, {key}: {why}; repair "
            "or delete them first"
        )
    head = {
        "format": FORMAT,
        "v": VERSION,
        "installation": installation,
        "index": snapshot.index,
        "records": len(snapshot.records),
        **({"floor": [floor.epoch, floor.generation]} if floor != NO_FLOOR else {}),
    }
    records = (snapshot.records[slug] for slug in sorted(snapshot.records))
    return [json.dumps(head), *(encode(record).decode() for record in records)]


def parse(file: TextIO) -> tuple[str, list[DeviceRecord], EpochFloor]:
    """Installation, records and floor of a backup. Raises UserError that names the line and what is wrong."""
    numbered = _numbered(file)
    _, first = next(numbered, (1, ""))
    installation, count, floor = _head(first)
    found: dict[Slug, DeviceRecord] = {}
    for number, line in numbered:
        try:
            record = decode(line.encode())
        except PoisonError as error:
            raise UserError(f"line {number}: {error}") from error
        if record.slug in found:
            raise UserError(f"line {number}: {record.slug} occurs twice")
        found[record.slug] = record
    if len(found) != count:
        raise UserError(f"the backup is not complete: {len(found)} records of {count}")
    return installation, list(found.values()), floor


def _numbered(file: TextIO) -> Iterator[tuple[int, str]]:
    try:
        for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES + 2), ""), 1):
            yield number, line.rstrip("\n")
    except ValueError as error:  # UnicodeDecodeError
        raise UserError(f"the backup is not UTF-8: {error}") from error


def _head(line: str) -> tuple[str, int, EpochFloor]:
    try:
        head = loads(line)
        if head["format"] != FORMAT or head["v"] != VERSION:
            raise ValueError  # noqa: TRY301  # the same sentence for all that is wrong with it
        epoch, generation = head.get("floor", [0, 0])
        floor = EpochFloor(Epoch(int(epoch)), int(generation))
        return str(uuid.UUID(head["installation"])), int(head["records"]), floor
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            "line 1: this is not a registry backup; create one with `nomad-watchdog registry export`"
        ) from None


async def _stored_floor(
    registry: Registry, records: Iterable[DeviceRecord], least: EpochFloor = NO_FLOOR
) -> tuple[EpochFloor, RegistryDocument | None]:
    """The registry's floor; one above these records and `least` if its document is damaged, and that document."""
    document = await registry.document(FLOOR)
    try:
        return floor_of(document), None
    except DamagedError:
        return rebuilt_floor(records, least), document


async def _restore_floor(
    registry: Registry, backup: Sequence[DeviceRecord], floor: EpochFloor, *, dry_run: bool
) -> tuple[EpochFloor, bool]:
    """Raise the registry's floor to the backup's. Returns the one of before, and whether it was damaged and is rebuilt.

    Epochs up to the registry's own floor were used after the backup, for devices that it has forgotten."""
    everything = [*(await registry.read()).records.values(), *backup]
    known, damaged = await _stored_floor(registry, everything, floor)
    if not dry_run and not (
        await registry.commit_document(FLOOR, floor_document(known, damaged.index))
        if damaged
        else await raise_floor(registry, floor)
    ):
        raise TransientError("the floor of the epochs is being changed by others; try again")
    return known, damaged is not None


async def restore(
    registry: Registry,
    installation: str,
    saved: Iterable[DeviceRecord],
    floor: EpochFloor = NO_FLOOR,
    *,
    dry_run: bool = False,
) -> Restored:
    """Restore a backup into a registry, which is initialised with the backup's installation if it is new.
    `floor`: of its deleted tombstones; the registry's own is raised to it first.

    Raises UserError when it belongs to another installation, TransientError when other writers win every
    compare-and-set; then it can be tried again."""
    backup = list(saved)
    try:
        own = await registry.installation()
    except UserError:
        own = installation if dry_run else await registry.initialise(installation)
        if dry_run:
            return Restored(own, len(backup), len(backup))
    if own != installation:
        raise UserError(
            f"the backup is of installation {installation}, this registry is {own}'s; to copy only the registered "
            "devices, use `devices export` and `devices import`"
        )
    known, rebuilt = await _restore_floor(registry, backup, floor, dry_run=dry_run)
    todo = {record.slug: record for record in backup}
    changed = 0
    for _ in range(TRIES):
        stored = (await registry.read()).records
        wanted = [
            fresh
            for slug, record in todo.items()
            if (fresh := presence.restore(stored.get(slug), known.freed(stored.get(slug), record)))
            is not None
        ]
        if dry_run or not wanted:
            return Restored(own, len(backup), changed + len(wanted), rebuilt)
        done = await registry.commit(wanted)
        changed += sum(one is not None for one in done)
        todo = {w.slug: todo[w.slug] for w, one in zip(wanted, done, strict=True) if one is None}
        if not todo:
            return Restored(own, len(backup), changed, rebuilt)
    raise TransientError(f"{len(todo)} records are being changed by others; try again")
