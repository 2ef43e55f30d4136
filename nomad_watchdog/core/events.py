"""Order among the wishes for one device: an event that is over must not come back (S5).

Signed events carry the sender's time. The record keeps that of the last one that changed it, and the ids
of those at that second, so that a replay is known after a restart and on another replica. A change by
other ways (PUT, DELETE, import) is dated by our own clock: the record's `changed_at`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Final

from nomad_watchdog.errors import OutOfDateError, TransientError
from nomad_watchdog.model import DeviceRecord, WallTime

MOST_AT_ONCE: Final = 16
"""Events of one device within one second that can be told apart."""


@dataclass(frozen=True, slots=True)
class Event:
    """A signed event: its id, and when its sender signed it (unix seconds)."""

    id: str
    at: int

    @property
    def mark(self) -> str:
        """What is kept of the id: 48 bits of its hash, as it can be long and is not ours."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:12]


def stamp(
    stored: DeviceRecord | None, wanted: DeviceRecord | None, event: Event | None, now: WallTime
) -> DeviceRecord | None:
    """The record to store, with the mark of the event that wants it; None = nothing changes.

    An event that changes nothing is let through whatever its age: it does no harm, and costs no write.
    Raises OutOfDateError for one that is older than the last change, TransientError for the 17th change
    within a second.
    """
    if wanted is None or stored is None:
        return wanted if event is None or wanted is None else _marked(wanted, event, ())
    if event is None:
        # A sender whose clock is ahead of ours keeps its date, or its own event could come back.
        ahead = stored.event_at >= now
        return wanted if ahead else replace(wanted, event_at=0, event_marks=())
    if stored.event_at == event.at:
        if event.mark in stored.event_marks:
            return None
        if len(stored.event_marks) >= MOST_AT_ONCE:
            raise TransientError("too many changes of this device in one second", retry_after_s=1.0)
        return _marked(wanted, event, stored.event_marks)
    last = stored.event_at or stored.changed_at
    # Of one second, an unsigned change is the later one: which it was can't be told any more.
    if event.at < last or (not stored.event_at and event.at == last):
        raise OutOfDateError(
            f"the event was signed {last - event.at:.0f} s before the last change of this device"
        )
    return _marked(wanted, event, ())


def is_replay(record: DeviceRecord, event: Event) -> bool:
    """Whether this event is one of those that made the record what it is."""
    return record.event_at == event.at and event.mark in record.event_marks


def _marked(record: DeviceRecord, event: Event, before: tuple[str, ...]) -> DeviceRecord:
    return replace(record, event_at=event.at, event_marks=(*before, event.mark))
