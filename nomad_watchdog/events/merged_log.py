"""The events of all replicas in one log: each change once, in the order in which it was published.

The leader publishes, the others copy (`replicas/event_replication.py`). A number begins with the term of the lease
under which it was given, so that the numbers of a new leader are above all that its predecessors gave, including
those that no replica has copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from watchdog_agent.runtime.parsing import bounded, finite, whole

from nomad_watchdog.core import event_merge
from nomad_watchdog.core.event_merge import Subject
from nomad_watchdog.events.log import MAX_TEXT, Event, EventLog
from nomad_watchdog.ids import MAX_ID_BYTES, Slug
from nomad_watchdog.model import WallTime

TERM_BITS: Final = 28
"""Bits of a number below the term: 268 million events per term, and a number stays below 2^53."""
MAX_NUMBER: Final = 1 << 53
MAX_SUBJECTS: Final = 200_000
MAX_ORIGINS: Final = 1_000
MAX_NUMBERS: Final = 20_000
"""Maximum number of own events whose number in the log is kept, to be marked later."""


@dataclass(slots=True)
class MergedLog:
    """The log, and the last state that was published of each subject."""

    log: EventLog
    last: OrderedDict[Subject, tuple[str, float]] = field(default_factory=OrderedDict)
    incidents: dict[Subject, tuple[str, str]] = field(default_factory=dict)
    """Open incidents, as they were published: ID and text."""
    _origins: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Replica → the last of its own numbers that was published."""
    _numbers: OrderedDict[int, int] = field(default_factory=OrderedDict)
    _marks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _terms: set[int] = field(default_factory=set)
    """In which this replica published."""

    def resume(
        self,
        events: Sequence[Event],
        verdicts: Iterable[tuple[Slug, str, float]],
        origins: Iterable[tuple[str, int]] = (),
    ) -> None:
        """Go on with what an earlier run knew: its last events, the last verdict of each device, and the
        last number of each origin, which may be older than those events."""
        for origin, number in origins:
            self._origins[origin] = number
        for slug, kind, at in verdicts:
            self.last[slug, "verdict"] = (kind, at)
        for event in events:
            self._note(event)
        self.log.resume(events[-1].seq if events else 0, events)

    def is_news(self, event: Event) -> bool:
        """Whether this event of a replica was not published yet."""
        if not event_merge.is_shared(event):
            return event.own_seq > self._origins.get(event.origin, 0)
        about = event_merge.subject(event)
        return about is not None and self.last.get(about, ("",))[0] != event_merge.state(event)

    def publish(self, event: Event, term: int) -> bool:
        """As the leader: give the event the next number, if it is new; whether it was."""
        if not self.is_news(event):
            return False
        number = max(self.log.last_seq + 1, term << TERM_BITS)
        self._terms.add(number >> TERM_BITS)
        if event.origin == self.log.origin:
            self._numbers[event.own_seq] = number
            if len(self._numbers) > MAX_NUMBERS:
                self._numbers.popitem(last=False)
        marks = self._marks.pop(event.incident, ()) if event.kind == "incident.opened" else ()
        self._append(replace(event, seq=number, own=event.own_seq, marks=marks))
        return True

    def copy(self, event: Event) -> bool:
        """As a reader of the leader's log: append the event as it is; whether it was new."""
        if event.seq <= self.log.last_seq:
            return False
        self._append(event)
        if event.marks:
            self.log.mark(event.marks, event.incident)
        return True

    def mark(self, own_seqs: Sequence[int], incident: str) -> None:
        """As the leader: own events with these numbers belong to an incident that is published next."""
        numbers = tuple(n for seq in own_seqs if (n := self._numbers.get(seq)) is not None)
        self.log.mark(numbers, incident)
        self._marks = {incident: numbers}

    def unpublished(self, own: Sequence[Event]) -> list[Event]:
        """Those of a replica's own events that were not published, as far as we know."""
        ring = self.log.recent()
        oldest = next(iter(ring), None)
        horizon = oldest.at if oldest is not None else float("-inf")
        shared = [event for event in own if event_merge.is_shared(event)]
        wanted = {event.seq for event in event_merge.unpublished(shared, self.last, horizon)}
        return [
            event
            for event in own
            if event.seq in wanted or (not event_merge.is_shared(event) and self.is_news(event))
        ]

    def withdraw(self, seq: int, keep: frozenset[int], last: int) -> list[Event]:
        """Remove what we published from after `seq` to `last` and is not in `keep`: no replica had copied it when
        another one became the leader. The new leader has published again what all replicas see; returns our own
        other events among them, oldest first, which are to be published again."""
        gone = [
            event
            for event in self.log.recent()
            if seq < event.seq <= last
            and event.seq not in keep
            and event.seq >> TERM_BITS in self._terms
        ]
        self.log.drop([event.seq for event in gone])
        alone = [e for e in gone if e.origin == self.log.origin and not event_merge.is_shared(e)]
        if alone:
            first = min(event.own_seq for event in alone)
            self._origins[self.log.origin] = min(self._origins[self.log.origin], first - 1)
        return [replace(event, seq=event.own_seq, own=0, marks=()) for event in alone]

    def _append(self, event: Event) -> None:
        self._note(event)
        self.log.append(event)

    def _note(self, event: Event) -> None:
        self._origins[event.origin] = max(self._origins.get(event.origin, 0), event.own_seq)
        self._origins.move_to_end(event.origin)
        if len(self._origins) > MAX_ORIGINS:
            self._origins.popitem(last=False)
        about = event_merge.subject(event) if event_merge.is_shared(event) else None
        if about is None:
            return
        self.last[about] = (event_merge.state(event), event.at)
        self.last.move_to_end(about)
        if len(self.last) > MAX_SUBJECTS:
            self.last.popitem(last=False)
        if event.kind == "incident.closed":
            self.incidents.pop(about, None)
        elif about[1].startswith("incident "):
            self.incidents[about] = (event.incident, event.text)


def event_of(fields: Mapping[str, object]) -> Event:
    """An event from the JSON that `Event.shown` returns. Raises ValueError for anything else."""
    try:
        own = _number(str(fields["id"]).rpartition(":")[2], least=1)
        at = _time(fields["at"])
        return Event(
            seq=_number(fields["seq"]),
            at=at,
            kind=str(fields["kind"])[:64],
            device_id=str(fields["device"])[:MAX_ID_BYTES],
            slug=Slug(str(fields["slug"])[:64]),
            text=str(fields["text"])[:MAX_TEXT],
            data=_data_of(fields),
            origin=str(fields["origin"])[:128],
            incident=str(fields.get("incident", ""))[:256],
            own=own,
            marks=tuple(_number(number) for number in _list_of(fields)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("this is not an event") from error


def _number(fields: object, least: int = 0) -> int:
    """A number that fits the store, and that programs in other languages read exactly."""
    return whole(str(fields), least, MAX_NUMBER - 1)


def _time(fields: object) -> WallTime:
    return WallTime(finite(str(fields)))


def _data_of(fields: Mapping[str, object]) -> dict[str, object]:
    data = fields.get("data", {})
    return bounded(data) if isinstance(data, dict) else {}


def _list_of(fields: Mapping[str, object]) -> list[object]:
    marks = fields.get("marks", [])
    return marks if isinstance(marks, list) else []
