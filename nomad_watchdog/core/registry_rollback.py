"""Whether a registry went back in time, as when a backup is restored under a running service.

Indexes only grow within one history. A snapshot shows everything up to its own index, so one that has an older
record than is known at or below that index, or whose own index is lower than one shown before, is of another history.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Presence

MAX_NAMED: Final = 20
"""Devices named in the text."""


@dataclass(frozen=True, slots=True)
class RegistryRollback:
    """What a registry took back."""

    older: tuple[DeviceRecord, ...] = ()
    """As known before; the registry now has an older record."""
    missing: tuple[DeviceRecord, ...] = ()
    """As known before; the registry has no record any more."""
    pauses: bool = False
    """The stored pauses are older than those known before."""

    @property
    def text(self) -> str:
        """In words."""
        parts = [
            part
            for records, what in (
                (self.older, "an older record than before"),
                (self.missing, "no record any more"),
            )
            if (part := _counted(records, what))
        ]
        if self.pauses:
            parts.append("the pauses are older than before")
        again = "; register the missing devices again" if self.missing else ""
        return (
            "the registry went back in time (a backup was restored, or records were deleted): "
            f"{'; '.join(parts)}{again} (docs/runbooks.md, RegistryRestored)"
        )


def of(
    known: Mapping[Slug, DeviceRecord],
    shown: Mapping[Slug, DeviceRecord],
    index_before: int,
    index: int,
) -> RegistryRollback | None:
    """What a snapshot of `index` takes back of what is known, None when it proves nothing.

    `shown`: its records, and those of `known` that may be newer than it. `index_before`: the highest index known
    when the read began. Missing records alone prove nothing while the index has grown: an answer may be cut short."""
    older = tuple(
        record
        for slug, record in known.items()
        if slug in shown and shown[slug].index < record.index
    )
    if not older and index >= index_before:
        return None
    # A tombstone that is gone was deleted by another replica.
    missing = tuple(
        record
        for slug, record in known.items()
        if slug not in shown and record.presence is Presence.PRESENT
    )
    return RegistryRollback(older, missing) if older or missing else None


def _counted(records: Iterable[DeviceRecord], what: str) -> str:
    names = sorted(record.device.id for record in records)
    if not names:
        return ""
    named = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return f"{len(names)} {'device has' if len(names) == 1 else 'devices have'} {what} ({named})"
