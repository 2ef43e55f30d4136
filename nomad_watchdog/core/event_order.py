"""Order of the events of one device: an event that is older than the last one changes nothing (S5).

Signed events carry the sender's time. The record keeps the time of the last event, even if it changed nothing else,
and marks of the ids within that second. Late events and replays are therefore detected after a restart and on other
replicas. Other changes (PUT, DELETE, import) are dated by our own clock: the record's `changed_at`.

An event that changes nothing writes only its mark, and at most MAX_AT_ONCE times per device and second of the
sender's clock.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Final

from nomad_watchdog.errors import OutOfDateError, TransientError
from nomad_watchdog.model import Departure, DeviceRecord, Presence, WallTime

MAX_AT_ONCE: Final = 16
"""Maximum number of events of one device that can be distinguished within one second."""


@dataclass(frozen=True, slots=True)
class SignedEvent:
    """A signed event: its id, and when its sender signed it (unix seconds)."""

    id: str
    at: int

    @property
    def mark(self) -> str:
        """Stored in place of the id: 48 bits of its hash, because the sender chooses the id and it can be long."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:12]


def stamp(
    stored: DeviceRecord | None,
    wanted: DeviceRecord | None,
    event: SignedEvent | None,
    now: WallTime,
) -> DeviceRecord | None:
    """The record to store, with the mark of the event that requests it; None = nothing to write.

    `wanted`: the record that the request makes of `stored`, None = no change. For an event that changes nothing, the
    returned record differs from `stored` only in the event's time and mark.

    Raises OutOfDateError for a change by an event that is older than the last one, or by a disconnect signed in the
    same second as another event: their order is unknown, and the device stays watched. Raises TransientError for the
    17th change within a second.
    """
    if stored is None:
        return wanted if event is None or wanted is None else _marked(wanted, event, ())
    if event is None:
        return _unsigned(stored, wanted, now)
    if wanted is None:
        return _noted(stored, event)
    if stored.event_at == event.at:
        if event.mark in stored.event_marks:
            return None
        if wanted.presence is Presence.ABSENT and stored.presence is Presence.PRESENT:
            raise OutOfDateError(
                "another event of this device was signed in the same second, so their order is not "
                "known; the device stays watched"
            )
        if len(stored.event_marks) >= MAX_AT_ONCE:
            raise TransientError("too many changes of this device in one second", retry_after_s=1.0)
        return _marked(wanted, event, stored.event_marks)
    if _is_late(stored, wanted, event):
        last = stored.event_at or stored.changed_at
        raise OutOfDateError(
            f"the event was signed {last - event.at:.0f} s before the last event or change of this "
            "device, which stands"
        )
    return _marked(wanted, event, ())


def _unsigned(
    stored: DeviceRecord, wanted: DeviceRecord | None, now: WallTime
) -> DeviceRecord | None:
    """The record for a request without a signature, which is dated by our clock."""
    if wanted is not None:
        # Keep the time of a sender whose clock is ahead of ours, or its event could be replayed.
        ahead = stored.event_at >= now
        return wanted if ahead else replace(wanted, event_at=0, event_marks=())
    # It confirms the state: signed events from before are late from now on.
    if 0 < stored.event_at < math.floor(now):
        return replace(stored, event_at=math.floor(now), event_marks=())
    return None


def _noted(stored: DeviceRecord, event: SignedEvent) -> DeviceRecord | None:
    """The record with the mark of an event that changes nothing else; None if the event is old or known."""
    if stored.event_at == event.at:
        known = event.mark in stored.event_marks or len(stored.event_marks) >= MAX_AT_ONCE
        return None if known else _marked(stored, event, stored.event_marks)
    if event.at <= (stored.event_at or stored.changed_at):
        return None
    return _marked(stored, event, ())


def _is_late(stored: DeviceRecord, wanted: DeviceRecord, event: SignedEvent) -> bool:
    if stored.event_at:
        return event.at < stored.event_at
    if event.at < math.floor(stored.changed_at):
        return True
    if event.at > stored.changed_at:
        return False
    # In the same second. An operator's removal is final; after another departure a device may return.
    blinked = stored.presence is Presence.ABSENT and stored.left is not Departure.REMOVED
    return not (blinked and wanted.presence is Presence.PRESENT)


def is_replay(record: DeviceRecord, event: SignedEvent) -> bool:
    """Whether this event was already applied to the record, or confirmed it."""
    return record.event_at == event.at and event.mark in record.event_marks


def is_mark_only(before: DeviceRecord | None, after: DeviceRecord) -> bool:
    """Whether two records of a device differ only in the time and marks of its events."""
    if before is None:
        return False
    same = replace(
        after, event_at=before.event_at, event_marks=before.event_marks, index=before.index
    )
    return same == before


def _marked(record: DeviceRecord, event: SignedEvent, before: tuple[str, ...]) -> DeviceRecord:
    return replace(record, event_at=event.at, event_marks=(*before, event.mark))
