"""The registry's document below which no epoch is given out again (`core.tombstones`)."""

from __future__ import annotations

import json
from typing import Final

from nomad_watchdog.core.tombstones import Floor
from nomad_watchdog.model import Epoch
from nomad_watchdog.registry import COMMIT_TRIES, Document, Registry, read_document

FLOOR: Final = "epoch-floor"
"""The registry's document that holds the floor (`core.tombstones`)."""


def floor_of(document: Document) -> Floor:
    """The floor in the registry's document. Raises UserError for one that can't be read."""
    if not document.body:
        return Floor()
    help_text = "restore the registry from a backup (`nomad-watchdog registry import FILE`)"
    return read_document(
        FLOOR,
        document.body,
        1,
        lambda said: Floor(Epoch(int(said["epoch"])), int(said["generation"])),
        help_text,
    )


async def raise_floor(registry: Registry, least: Floor) -> bool:
    """Have the stored floor at `least` or above; False when other writers won COMMIT_TRIES times in a row.
    Raises as `Registry.commit_document`."""
    for _ in range(COMMIT_TRIES):
        stored = await registry.document(FLOOR)
        floor = floor_of(stored)
        epoch, generation = max(floor.epoch, least.epoch), max(floor.generation, least.generation)
        if Floor(epoch, generation) == floor:
            return True
        body = json.dumps({"v": 1, "epoch": epoch, "generation": generation}).encode()
        if await registry.commit_document(FLOOR, Document(body, stored.index)) is not None:
            return True
    return False
