"""The last events, in memory and bounded (S9); older ones are in the store, if there is one."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice, takewhile
from typing import Final, Protocol, cast

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import WallTime
from nomad_watchdog.secret_values import hide, hide_in
from nomad_watchdog.signals import Signal

MAX_EVENTS: Final = 10_000
MAX_DEVICES: Final = 2_000
PER_DEVICE: Final = 12
MAX_TEXT: Final = 1_024
AUDIT: Final = "audit."
"""Prefix of the kinds of audit events, which are kept apart from the others."""
MAX_PER_ACTOR: Final = 2_000
MAX_ACTORS: Final = 64
"""Maximum number of actors, of all control planes, whose audit events are in memory."""


def is_audit(kind: str) -> bool:
    """Whether events of this kind are kept apart from all others."""
    return kind.startswith(AUDIT)


@dataclass(slots=True)
class Event:
    """Something that happened. `seq` increases; a gap means that events were dropped, or that a crash left some
    numbers unused. No number is used twice, so `id` is unique for ever."""

    seq: int
    at: WallTime
    kind: str
    device_id: str
    slug: Slug
    text: str
    data: Mapping[str, object]
    origin: str = "local"
    """The control plane that observed it."""
    incident: str = ""
    """The incident that explains it. The one field that is set later: what happened to one device is
    known to be part of something larger only when the others have been seen."""
    own: int = 0
    """Its number among the events of its origin, in a log that gives other numbers; 0 = `seq` is it."""
    marks: tuple[int, ...] = ()
    """Of an incident that was opened: the numbers of the events that it explains. For other replicas, in
    memory only."""

    @property
    def own_seq(self) -> int:
        """The number that its origin gave it."""
        return self.own or self.seq

    @property
    def id(self) -> str:
        """Unique among all control planes whose origins differ."""
        return f"{self.origin}:{self.own_seq}"

    def shown(self, *, marks: bool = False) -> dict[str, object]:
        """For JSON. `marks`: with those, if there are any."""
        return {
            "id": self.id,
            "seq": self.seq,
            "origin": self.origin,
            "at": self.at,
            "kind": self.kind,
            "device": self.device_id,
            "slug": self.slug,
            "text": self.text,
            **({"incident": self.incident} if self.incident else {}),
            **({"data": dict(self.data)} if self.data else {}),
            **({"marks": list(self.marks)} if marks and self.marks else {}),
        }


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events are wanted; an empty field wants all."""

    device: str = ""
    """The device's id."""
    kind: str = ""
    """Start of the kind: `verdict` or `verdict.offline`."""
    verdict: str = ""
    not_before: float = 0.0
    """Wall time."""

    def admits(self, event: Event) -> bool:
        """Whether the event is wanted."""
        return (
            (not self.device or event.device_id == self.device)
            and event.kind.startswith(self.kind)
            and (not self.verdict or event.kind == f"verdict.{self.verdict}")
            and event.at >= self.not_before
        )


@dataclass(slots=True)
class _Audit:
    """The last audit events of each actor: neither other events nor other actors displace them."""

    events: dict[int, Event] = field(default_factory=dict)
    """By number, in ascending order."""
    lost: int = 0
    """The highest number of an event that was removed."""
    _actors: OrderedDict[tuple[str, str], deque[int]] = field(default_factory=OrderedDict)

    def add(self, event: Event, own: str) -> None:
        """Append one. `own`: the origin whose actors are removed last."""
        actor = event.origin, str(event.data.get("actor", ""))
        mine = self._actors.setdefault(actor, deque())
        self._actors.move_to_end(actor)
        mine.append(event.seq)
        self.events[event.seq] = event
        if len(mine) > MAX_PER_ACTOR:
            self._lose(mine.popleft())
        if len(self._actors) > MAX_ACTORS:
            others = (one for one in self._actors if one[0] != own)
            for seq in self._actors.pop(next(others, next(iter(self._actors)))):
                self._lose(seq)

    def _lose(self, seq: int) -> None:
        if self.events.pop(seq, None) is not None:
            self.lost = max(self.lost, seq)

    def after(self, since: int) -> list[Event]:
        """Those with a number above `since`, oldest first."""
        newer = takewhile(lambda event: event.seq > since, reversed(self.events.values()))
        return list(newer)[::-1]


EVERYTHING: Final = EventFilter()
Page = tuple[list[Event], int]
"""Events, oldest first, and the number to ask with next."""


class EventSink(Protocol):
    """Where events outlive the process."""

    def put(self, event: Event) -> None:
        """Take one event; never blocks, never raises."""

    def mark(self, seqs: Sequence[int], incident: str) -> None:
        """Events of these numbers belong to an incident; never blocks, never raises."""

    def drop(self, seqs: Sequence[int]) -> None:
        """Forget events of these numbers; never blocks, never raises."""

    async def select(self, since: int, before: int, limit: int, wanted: EventFilter) -> Page:
        """Events with since < seq < before. When fewer than `limit` are there, the number to go on
        with is before - 1. Raises WatchdogError."""


@dataclass(slots=True)
class EventLog:
    """A ring of events, one of audit events, and the last few of each device that had any lately."""

    origin: str = "local"
    store: EventSink | None = None
    is_copied: bool = False
    """The numbers come from another replica: a reader may already know higher ones than are here."""
    added: Signal[[Event]] = field(default_factory=Signal)
    """An event was observed here."""
    marked: Signal[[Sequence[int], str]] = field(default_factory=Signal)
    """Events were marked with an incident, before the event of the incident itself."""
    _ring: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    _audit: _Audit = field(default_factory=_Audit)
    _devices: OrderedDict[Slug, deque[Event]] = field(default_factory=OrderedDict)
    _seq: int = 0
    _lost: int = 0
    """The highest number that is not in memory any more, or never was; the store may have it."""
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def resume(self, seq: int, events: Iterable[Event]) -> None:
        """Go on after `seq`, with the last events of an earlier run. Numbers that are in use stay."""
        known = [event for event in events if event.seq > self._seq]
        firsts = {is_audit(event.kind): event.seq - 1 for event in reversed(known)}
        self._lost = max(self._lost, *firsts.values(), seq if not known else 0)
        for event in known:
            self._keep(event)
        self._seq = max(self._seq, seq)

    def add(
        self,
        *,
        at: WallTime,
        kind: str,
        device_id: str,
        slug: Slug,
        text: str,
        data: Mapping[str, object],
        incident: str = "",
    ) -> Event:
        """Append an event; the oldest is removed. Several lines of text become one."""
        text = "; ".join(text.splitlines())
        text, data = hide(text), cast("Mapping[str, object]", hide_in(data))
        text = text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
        event = Event(self._seq + 1, at, kind, device_id, slug, text, data, self.origin, incident)
        self.append(event)
        self.added.emit(event)
        return event

    def append(self, event: Event) -> None:
        """Append an event that already has a number, above all that are here; the oldest is removed."""
        self._keep(event)
        if self.store is not None:
            self.store.put(event)
        self._news.set()

    def drop(self, seqs: Sequence[int]) -> None:
        """Remove the events with these numbers."""
        gone = set(seqs)
        if not gone:
            return
        self._ring = deque((e for e in self._ring if e.seq not in gone), maxlen=MAX_EVENTS)
        for seq in gone:
            self._audit.events.pop(seq, None)
        if self.is_copied and self._seq in gone:
            self._seq = max((event.seq for event in self.recent()), default=0)
        for mine in self._devices.values():
            for event in [e for e in mine if e.seq in gone]:
                mine.remove(event)
        if self.store is not None:
            self.store.drop(seqs)

    def _keep(self, event: Event) -> None:
        self._seq = event.seq
        if is_audit(event.kind):
            self._audit.add(event, self.origin)
        else:
            if len(self._ring) == MAX_EVENTS:
                self._lost = max(self._lost, self._ring[0].seq)
            self._ring.append(event)
        mine = self._devices.setdefault(event.slug, deque(maxlen=PER_DEVICE))
        mine.append(event)
        self._devices.move_to_end(event.slug)
        if len(self._devices) > MAX_DEVICES:
            self._devices.popitem(last=False)

    @property
    def last_seq(self) -> int:
        """The number of the newest event."""
        return self._seq

    def mark(self, seqs: Sequence[int], incident: str) -> None:
        """Record that these events are part of an incident."""
        for seq in seqs:
            place = bisect_left(self._ring, seq, key=_number)
            if place < len(self._ring) and self._ring[place].seq == seq:
                self._ring[place].incident = incident
        if self.store is not None:
            self.store.mark(seqs, incident)
        self.marked.emit(seqs, incident)

    def recent(self) -> Iterable[Event]:
        """What is in memory, oldest first."""
        return merge(self._ring, self._audit.after(0), key=_number)

    def after(self, since: int, limit: int, wanted: EventFilter = EVERYTHING) -> Page:
        """Of what is in memory: events with seq > since, oldest first, at most `limit`."""
        first = bisect_left(self._ring, since + 1, key=_number)
        rest: Iterable[Event] = islice(self._ring, first, None)
        audits = self._audit.after(since)
        if is_audit(wanted.kind):
            rest = audits
        elif audits:
            rest = merge(rest, audits, key=_number)
        found = list(islice((event for event in rest if wanted.admits(event)), limit))
        # Fewer than requested: all events were checked, so the next call begins after them.
        return found, found[-1].seq if len(found) == limit else max(since, self._seq)

    async def page(self, since: int, limit: int, wanted: EventFilter = EVERYTHING) -> Page:
        """As `after`, the store included. Raises WatchdogError when the store can't be read."""
        if not self.is_copied:
            since = min(since, self._seq)
        lost = max(self._lost, self._audit.lost)
        if self.store is None or since >= lost:
            return self.after(since, limit, wanted)
        stored, _ = await self.store.select(since, lost + 1, limit, wanted)
        here, following = self.after(since, limit, wanted)
        # In memory is what is newest, and what could not be stored.
        known = {event.seq: event for event in (*stored, *here)}
        found = [known[seq] for seq in sorted(known)[:limit]]
        return found, found[-1].seq if len(found) == limit else following

    async def wait(self, since: int, timeout_s: float) -> None:
        """Return when there is an event after `since`, or after timeout_s."""
        if self._seq > since:
            return
        self._news.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return

    def of_device(self, slug: Slug) -> list[Event]:
        """The last few events of one device, oldest first."""
        return list(self._devices.get(slug, ()))


def _number(event: Event) -> int:
    return event.seq
