"""Decides which dead placements are purged from the scheduler, and when.

While a scheduler lists a placement, dead or alive, a late request for its epoch creates no second one. A request may
still be in flight when its sender has timed out or crashed, so a dead placement stays listed for longer than any
request can take (S2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Monotonic, Placement, PlacementState, Presence

REST_S: Final = 90.0
"""Time for which a dead placement is kept, in seconds. A client times out after 20 s at most (`clients.nomad`);
proxies and queues may add to it."""
TOMBSTONE_REST_S: Final = 600.0
"""Time for which a tombstone that is due is kept, in seconds, by our monotonic clock: a change of the wall clock must
not delete it while a request for its device may be in flight."""
MOST: Final = 50
"""Maximum number of placements that are purged at a time: purging loads the scheduler."""


class PlacementGc:
    """Remembers since when each placement has been dead."""

    def __init__(self) -> None:
        self._since: dict[str, Monotonic] = {}
        self._tombstones: dict[tuple[Slug, int], Monotonic] = {}
        """Slug and index of the tombstones that are due → since when."""

    def due(
        self,
        records: Mapping[Slug, DeviceRecord],
        placements: Mapping[Slug, tuple[Placement, ...]],
        now: Monotonic,
    ) -> list[Placement]:
        """Dead placements that are not needed and have been dead for REST_S."""
        dead = [
            placement
            for slug, found in placements.items()
            for placement in found
            if placement.state is PlacementState.DEAD and _is_over(placement, records.get(slug))
        ]
        self._since = {one.ref: self._since.get(one.ref, now) for one in dead}
        return [one for one in dead if now - self._since[one.ref] >= REST_S][:MOST]

    def rested(self, due: Sequence[DeviceRecord], now: Monotonic) -> list[DeviceRecord]:
        """The tombstones in `due` that have been due for TOMBSTONE_REST_S."""
        since = {key: self._tombstones.get(key, now) for key in map(_key, due)}
        self._tombstones = since
        return [one for one in due if now - since[_key(one)] >= TOMBSTONE_REST_S]


def _key(record: DeviceRecord) -> tuple[Slug, int]:
    return record.slug, record.index


def _is_over(placement: Placement, record: DeviceRecord | None) -> bool:
    if record is None or record.presence is Presence.ABSENT:
        return True
    return placement.epoch < record.epoch
