"""The events of all replicas as one: each change once, in the order in which it was told.

One replica at a time tells (`replicas/event_replication.py`), the others copy. A number begins with the term of the lease
under which it was given, so that those of a new teller are above all that its predecessors gave, also those
that nobody has copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from watchdog_agent.runtime.parsing import bounded, finite, whole

from nomad_watchdog.core import event_merge
from nomad_watchdog.core.event_merge import Subject
from nomad_watchdog.events.log import Event, EventLog
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import WallTime

TERM_BITS: Final = 28
"""Of a number those below the term: 268 million events a term, and a number stays below 2^53."""
MAX_NUMBER: Final = 1 << 53
MAX_SUBJECTS: Final = 200_000
MAX_ORIGINS: Final = 1_000
MAX_NUMBERS: Final = 20_000
"""Own events whose number in the log is remembered, to be marked later."""


@dataclass(slots=True)
class MergedLog:
    """The log, and what follows from it: the last state that was told of each subject."""

    log: EventLog
    last: OrderedDict[Subject, tuple[str, float]] = field(default_factory=OrderedDict)
    incidents: dict[Subject, tuple[str, str]] = field(default_factory=dict)
    """Open incidents, as they were told: id and text."""
    _origins: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Replica → the last of its own numbers that was told."""
    _numbers: OrderedDict[int, int] = field(default_factory=OrderedDict)
    _marks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _terms: set[int] = field(default_factory=set)
    """Under which we told."""

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
            self._learn(event)
        self.log.resume(events[-1].seq if events else 0, events)

    def is_news(self, event: Event) -> bool:
        """Whether this event of a replica says what was not told yet."""
        if not event_merge.is_shared(event):
            return event.own_seq > self._origins.get(event.origin, 0)
        about = event_merge.subject(event)
        return about is not None and self.last.get(about, ("",))[0] != event_merge.state(event)

    def tell(self, event: Event, term: int) -> bool:
        """As the teller: give it the next number, if it is news; whether it was."""
        if not self.is_news(event):
            return False
        number = max(self.log.last_seq + 1, term << TERM_BITS)
        self._terms.add(number >> TERM_BITS)
        if event.origin == self.log.origin:
            self._numbers[event.own_seq] = number
            if len(self._numbers) > MAX_NUMBERS:
                self._numbers.popitem(last=False)
        marks = self._marks.pop(event.incident, ()) if event.kind == "incident.opened" else ()
        self._take(replace(event, seq=number, own=event.own_seq, marks=marks))
        return True

    def copy(self, event: Event) -> bool:
        """As a reader of another replica's log: keep it as it is; whether it was news."""
        if event.seq <= self.log.last_seq:
            return False
        self._take(event)
        if event.marks:
            self.log.mark(event.marks, event.incident)
        return True

    def mark(self, own_seqs: Sequence[int], incident: str) -> None:
        """As the teller: own events of these numbers belong to an incident that is told next."""
        numbers = tuple(n for seq in own_seqs if (n := self._numbers.get(seq)) is not None)
        self.log.mark(numbers, incident)
        self._marks = {incident: numbers}

    def untold(self, own: Sequence[Event]) -> list[Event]:
        """Of a replica's own events those that nobody has told, as far as we know."""
        ring = self.log.recent()
        oldest = next(iter(ring), None)
        horizon = oldest.at if oldest is not None else float("-inf")
        shared = [event for event in own if event_merge.is_shared(event)]
        wanted = {event.seq for event in event_merge.untold(shared, self.last, horizon)}
        return [
            event
            for event in own
            if event.seq in wanted or (not event_merge.is_shared(event) and self.is_news(event))
        ]

    def take_back(self, seq: int, keep: frozenset[int], upto: int) -> list[Event]:
        """Forget what we told between `seq` and `upto` that is not in `keep`: nobody had copied it when
        another became the teller. What all replicas see that one has told anew; our own other events
        among them, oldest first, are untold again."""
        gone = [
            event
            for event in self.log.recent()
            if seq < event.seq <= upto
            and event.seq not in keep
            and event.seq >> TERM_BITS in self._terms
        ]
        self.log.drop([event.seq for event in gone])
        alone = [e for e in gone if e.origin == self.log.origin and not event_merge.is_shared(e)]
        if alone:
            first = min(event.own_seq for event in alone)
            self._origins[self.log.origin] = min(self._origins[self.log.origin], first - 1)
        return [replace(event, seq=event.own_seq, own=0, marks=()) for event in alone]

    def _take(self, event: Event) -> None:
        self._learn(event)
        self.log.take(event)

    def _learn(self, event: Event) -> None:
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


def event_of(said: Mapping[str, object]) -> Event:
    """An event as `Event.shown` gives it. Raises ValueError for what is none."""
    try:
        own = _number(str(said["id"]).rpartition(":")[2], least=1)
        at = _time(said["at"])
        return Event(
            seq=_number(said["seq"]),
            at=at,
            kind=str(said["kind"])[:64],
            device_id=str(said["device"]),
            slug=Slug(str(said["slug"])),
            text=str(said["text"]),
            data=_data_of(said),
            origin=str(said["origin"])[:128],
            incident=str(said.get("incident", ""))[:256],
            own=own,
            marks=tuple(_number(number) for number in _list_of(said)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("this is no event") from error


def _number(said: object, least: int = 0) -> int:
    """One that a store takes, and that programs in other languages read exactly."""
    return whole(str(said), least, MAX_NUMBER - 1)


def _time(said: object) -> WallTime:
    return WallTime(finite(str(said)))


def _data_of(said: Mapping[str, object]) -> dict[str, object]:
    data = said.get("data", {})
    return bounded(data) if isinstance(data, dict) else {}


def _list_of(said: Mapping[str, object]) -> list[object]:
    marks = said.get("marks", [])
    return marks if isinstance(marks, list) else []
