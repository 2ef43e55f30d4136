"""Order among the events for one device: an event that is older than the last one changes nothing (S5).

Signed events carry the sender's time. The record keeps that of the last event, also of one that changed
nothing else, and marks of the ids at that second: so a late event or a replay is known after a restart and
on another replica. A change by other ways (PUT, DELETE, import) is dated by our own clock: the record's
`changed_at`.

An event that changes nothing writes its mark and no more, and at most MAX_AT_ONCE times per device and
second of the sender's clock.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Final

from nomad_watchdog.errors import OutOfDateError, TransientError
from nomad_watchdog.model import Departure, DeviceRecord, Presence, WallTime

MAX_AT_ONCE: Final = 16
"""Events of one device within one second that can be told apart."""


@dataclass(frozen=True, slots=True)
class SignedEvent:
    """A signed event: its id, and when its sender signed it (unix seconds)."""

    id: str
    at: int

    @property
    def mark(self) -> str:
        """What is kept of the id: 48 bits of its hash, as it can be long and is not ours."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:12]


def stamp(
    stored: DeviceRecord | None,
    wanted: DeviceRecord | None,
    event: SignedEvent | None,
    now: WallTime,
) -> DeviceRecord | None:
    """The record to store, with the mark of the event that asks for it; None = nothing is to be written.

    `wanted`: the record that the request makes of `stored`, None when it changes nothing. The record that
    is returned for an event that changes nothing differs from `stored` in its marks only.

    Raises OutOfDateError for a change by an event that is older than the last one, or by a disconnect of
    the same second as another event: their order is not known, and the device stays watched. Raises
    TransientError for the 17th change within a second.
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
    """A request without a signature: dated by our clock."""
    if wanted is not None:
        # A sender whose clock is ahead of ours keeps its date, or its own event could come back.
        ahead = stored.event_at >= now
        return wanted if ahead else replace(wanted, event_at=0, event_marks=())
    # It confirms the state: where events are signed, older ones are late from now on.
    if 0 < stored.event_at < math.floor(now):
        return replace(stored, event_at=math.floor(now), event_marks=())
    return None


def _noted(stored: DeviceRecord, event: SignedEvent) -> DeviceRecord | None:
    """The record with the mark of an event that changes nothing else; None when it is old or known."""
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
    # Of one second. An operator's removal is final; a device that only blinked may be there again.
    blinked = stored.presence is Presence.ABSENT and stored.left is not Departure.REMOVED
    return not (blinked and wanted.presence is Presence.PRESENT)


def is_replay(record: DeviceRecord, event: SignedEvent) -> bool:
    """Whether this event is one of those that made the record what it is, or confirmed it."""
    return record.event_at == event.at and event.mark in record.event_marks


def is_mark_only(before: DeviceRecord | None, after: DeviceRecord) -> bool:
    """Whether two records of a device differ in what guards the order of its events, and in no more."""
    if before is None:
        return False
    same = replace(
        after, event_at=before.event_at, event_marks=before.event_marks, index=before.index
    )
    return same == before


def _marked(record: DeviceRecord, event: SignedEvent, before: tuple[str, ...]) -> DeviceRecord:
    return replace(record, event_at=event.at, event_marks=(*before, event.mark))
