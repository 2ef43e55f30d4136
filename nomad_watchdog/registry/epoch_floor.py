"""The registry's document below which no epoch is given out again (`core.tombstones`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Final

from pydantic import BaseModel, NonNegativeInt

from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.model import DeviceRecord, Epoch
from nomad_watchdog.registry import Registry, RegistryDocument
from nomad_watchdog.registry.document import Document, DocumentFormat

FLOOR: Final = "epoch-floor"
"""The registry's document that holds the floor (`core.tombstones`)."""
REBUILT_MARGIN: Final = 1_000_000
"""More epochs than a deleted tombstone can have been above all that are known: one for each agent of a device."""


class _FloorFields(BaseModel, strict=True):
    epoch: NonNegativeInt
    generation: NonNegativeInt


def _parse(fields: object) -> EpochFloor:
    found = _FloorFields.model_validate(fields)
    return EpochFloor(Epoch(found.epoch), found.generation)


FORMAT: Final[DocumentFormat[EpochFloor]] = DocumentFormat(
    name=FLOOR,
    empty=EpochFloor(),
    parse=_parse,
    serialize=asdict,
    repair=(
        "devices without an earlier agent are not started until it is repaired: run `nomad-watchdog registry export "
        ">FILE` and `nomad-watchdog registry import FILE`, which writes it anew"
    ),
)


def floor_of(document: RegistryDocument) -> EpochFloor:
    """The floor in the registry's document. Raises as `DocumentFormat.decode`."""
    return FORMAT.decode(document.body)


def rebuilt_floor(records: Iterable[DeviceRecord], least: EpochFloor) -> EpochFloor:
    """A floor in place of one that can't be read, above all that is known and, by REBUILT_MARGIN, above what the
    deleted tombstones can have had."""
    known = least.over(records)
    return EpochFloor(Epoch(known.epoch + REBUILT_MARGIN), known.generation + REBUILT_MARGIN)


def floor_document(floor: EpochFloor, index: int) -> RegistryDocument:
    """The floor as it is stored; `index`: of the document that it replaces."""
    return RegistryDocument(FORMAT.encode(floor), index)


async def raise_floor(registry: Registry, least: EpochFloor) -> bool:
    """Have the stored floor at `least` or above; False when other writers won every compare-and-set.
    Raises as `Registry.commit_document`."""

    def change(floor: EpochFloor) -> EpochFloor:
        generation = max(floor.generation, least.generation)
        return EpochFloor(max(floor.epoch, least.epoch), generation)

    try:
        await Document(registry, FORMAT).update(change)
    except ConflictError:
        return False
    return True
