"""What the fleet needs of the reconciler: it announces changes, and asks what is known of the placements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord


class ReconcileLoop(Protocol):
    """The loop that acts for this fleet."""

    def records_changed(self, records: Sequence[DeviceRecord], /) -> None:
        """Records were stored or read."""

    def read_again(self, slug: Slug, /) -> None:
        """Read the placements of this device soon."""

    def is_behind(self, slug: Slug, /) -> bool:
        """Whether the known placements of a device are older than its record (S8)."""
        ...

    def is_new_rival(self, slug: Slug, instance: str, /) -> bool:
        """Whether this instance reports for the first time beside the accepted one. Then the known placements of
        the device count as older than its record, and are read soon (S8)."""
        ...

    def obstacle(self, slug: Slug, /) -> str:
        """Why the device cannot have an agent now; "" = it can."""
        ...

    def plan(self) -> dict[str, object]:
        """What the next pass would do, as JSON."""
        ...


class NoLoop:
    """In place of the loop until one is attached: nothing is known of placements."""

    def records_changed(self, _records: Sequence[DeviceRecord]) -> None:
        """Ignored."""

    def read_again(self, _slug: Slug) -> None:
        """Ignored."""

    def is_behind(self, _slug: Slug) -> bool:
        """Never."""
        return False

    def is_new_rival(self, _slug: Slug, _instance: str) -> bool:
        """Never."""
        return False

    def obstacle(self, _slug: Slug) -> str:
        """None known."""
        return ""

    def plan(self) -> dict[str, object]:
        """Empty."""
        return {}
