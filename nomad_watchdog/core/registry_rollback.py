"""Detects that a registry went back in time, for example if a backup is restored under a running service.

Indexes only increase within one history. A snapshot contains everything up to its own index. It is therefore of
another history if one of its records is older than a known one at or below that index, or if its own index is lower
than that of an earlier snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Presence

MAX_NAMED: Final = 20
"""Maximum number of devices named in the text."""


@dataclass(frozen=True, slots=True)
class RegistryRollback:
    """What a registry has lost."""

    older: tuple[DeviceRecord, ...] = ()
    """Records as known before; the registry now has older ones."""
    missing: tuple[DeviceRecord, ...] = ()
    """Records as known before; the registry no longer has them."""
    pauses: bool = False
    """The stored pauses are older than those known before."""

    @property
    def text(self) -> str:
        """The rollback in words, for operators."""
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
    """What a snapshot at `index` has lost of `known`, None if it does not prove a rollback.

    `shown`: its records, and those of `known` that may be newer than the snapshot. `index_before`: the highest index
    known when the read began. Missing records alone prove nothing unless the index has decreased: an answer may be
    truncated."""
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
