"""Which dead placements the scheduler may forget, and when.

As long as a scheduler lists a placement, dead or alive, a late request for its epoch makes no second
one. A request may still be on its way when its sender has given up or died, so a dead placement stays
listed for longer than any request can travel (S2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Monotonic, Placement, PlacementState, Presence

REST_S: Final = 90.0
"""A client gives up after 20 s at most (`clients.nomad`); proxies and queues on the way may add to it."""
TOMBSTONE_REST_S: Final = 600.0
"""A tombstone that is due is kept for so long by our own clock: a wall clock that was set deletes none while a
request for its device may be on its way."""
MOST: Final = 50
"""At most so many are forgotten at a time: purging costs the scheduler."""


class PlacementGc:
    """Remembers since when each placement has been seen dead."""

    def __init__(self) -> None:
        self._since: dict[str, Monotonic] = {}
        self._tombstones: dict[tuple[Slug, int], Monotonic] = {}
        """Slug and index of those that are due → since when."""

    def due(
        self,
        records: Mapping[Slug, DeviceRecord],
        placements: Mapping[Slug, tuple[Placement, ...]],
        now: Monotonic,
    ) -> list[Placement]:
        """Dead placements that nobody needs and that have rested for REST_S."""
        dead = [
            placement
            for slug, found in placements.items()
            for placement in found
            if placement.state is PlacementState.DEAD and _is_over(placement, records.get(slug))
        ]
        self._since = {one.ref: self._since.get(one.ref, now) for one in dead}
        return [one for one in dead if now - self._since[one.ref] >= REST_S][:MOST]

    def rested(self, due: Sequence[DeviceRecord], now: Monotonic) -> list[DeviceRecord]:
        """Of the tombstones that are due, those that have been for TOMBSTONE_REST_S."""
        since = {key: self._tombstones.get(key, now) for key in map(_key, due)}
        self._tombstones = since
        return [one for one in due if now - since[_key(one)] >= TOMBSTONE_REST_S]


def _key(record: DeviceRecord) -> tuple[Slug, int]:
    return record.slug, record.index


def _is_over(placement: Placement, record: DeviceRecord | None) -> bool:
    if record is None or record.presence is Presence.ABSENT:
        return True
    return placement.epoch < record.epoch
