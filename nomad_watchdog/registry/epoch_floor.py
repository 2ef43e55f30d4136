"""The registry's document below which no epoch is given out again (`core.tombstones`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.model import DeviceRecord, Epoch
from nomad_watchdog.registry import COMMIT_TRIES, Registry, RegistryDocument, read_document

FLOOR: Final = "epoch-floor"
"""The registry's document that holds the floor (`core.tombstones`)."""
REBUILT_MARGIN: Final = 1_000_000
"""More epochs than a deleted tombstone can have been above all that are known: one for each agent of a device."""
_REPAIR: Final = (
    "devices without an earlier agent are not started until it is repaired: run `nomad-watchdog registry export >FILE` "
    "and `nomad-watchdog registry import FILE`, which writes it anew"
)


def floor_of(document: RegistryDocument) -> EpochFloor:
    """The floor in the registry's document. Raises DamagedError for one that can't be read."""
    if not document.body:
        return EpochFloor()
    return read_document(FLOOR, document.body, 1, _floor, _REPAIR)


def _floor(said: Any) -> EpochFloor:
    epoch, generation = said["epoch"], said["generation"]
    if type(epoch) is not int or type(generation) is not int or min(epoch, generation) < 0:
        raise ValueError
    return EpochFloor(Epoch(epoch), generation)


def rebuilt_floor(records: Iterable[DeviceRecord], least: EpochFloor) -> EpochFloor:
    """A floor in place of one that can't be read, above all that is known and, by REBUILT_MARGIN, above what the
    deleted tombstones can have had."""
    known = least.over(records)
    return EpochFloor(Epoch(known.epoch + REBUILT_MARGIN), known.generation + REBUILT_MARGIN)


def floor_document(floor: EpochFloor, index: int) -> RegistryDocument:
    """The floor as it is stored; `index`: of what it replaces."""
    body = json.dumps({"v": 1, "epoch": floor.epoch, "generation": floor.generation}).encode()
    return RegistryDocument(body, index)


async def raise_floor(registry: Registry, least: EpochFloor) -> bool:
    """Have the stored floor at `least` or above; False when other writers won COMMIT_TRIES times in a row.
    Raises as `Registry.commit_document`."""
    for _ in range(COMMIT_TRIES):
        stored = await registry.document(FLOOR)
        floor = floor_of(stored)
        epoch, generation = max(floor.epoch, least.epoch), max(floor.generation, least.generation)
        if EpochFloor(epoch, generation) == floor:
            return True
        document = floor_document(EpochFloor(epoch, generation), stored.index)
        if await registry.commit_document(FLOOR, document) is not None:
            return True
    return False
