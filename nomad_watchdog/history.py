"""The last events, in memory and bounded (S9); older ones are in the store, if there is one."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol, cast

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import WallTime
from nomad_watchdog.secret_values import hide, hide_in

MOST_EVENTS: Final = 10_000
MOST_DEVICES: Final = 2_000
PER_DEVICE: Final = 12
MOST_TEXT: Final = 1_024


@dataclass(slots=True)
class Event:
    """Something that happened. `seq` goes up; a gap means that older events were dropped, or that a
    crash left some numbers unused. No number is given twice, so that `id` names one event for ever."""

    seq: int
    at: WallTime
    kind: str
    device_id: str
    slug: Slug
    text: str
    data: Mapping[str, object]
    origin: str = "local"
    """Which control plane saw it."""
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


EVERYTHING: Final = EventFilter()
Page = tuple[list[Event], int]
"""Events, oldest first, and the number to ask with next."""


class Store(Protocol):
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
class History:
    """A ring of events, and the last few of each device that had any lately."""

    origin: str = "local"
    store: Store | None = None
    is_copied: bool = False
    """Numbers are given elsewhere: one that a reader brings may be ahead of what has come here so far."""
    on_add: Callable[[Event], None] | None = None
    """Told of each event that was seen here."""
    on_mark: Callable[[Sequence[int], str], None] | None = None
    """Told of each `mark`, before the event of the incident itself."""
    _ring: deque[Event] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    _devices: OrderedDict[Slug, deque[Event]] = field(default_factory=OrderedDict)
    _seq: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def resume(self, seq: int, events: Iterable[Event]) -> None:
        """Go on after `seq`, with the last events of an earlier run. Numbers that are in use stay."""
        for event in events:
            if event.seq > self._seq:
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
        """Append one; the oldest falls out."""
        text, data = hide(text), cast("Mapping[str, object]", hide_in(data))
        text = text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"
        event = Event(self._seq + 1, at, kind, device_id, slug, text, data, self.origin, incident)
        self.take(event)
        if self.on_add is not None:
            self.on_add(event)
        return event

    def take(self, event: Event) -> None:
        """Append one that has a number above all that are here; the oldest falls out."""
        self._keep(event)
        if self.store is not None:
            self.store.put(event)
        self._news.set()

    def drop(self, seqs: Sequence[int]) -> None:
        """Forget the events of these numbers."""
        gone = set(seqs)
        if not gone:
            return
        self._ring = deque((e for e in self._ring if e.seq not in gone), maxlen=MOST_EVENTS)
        if self.is_copied and self._seq in gone:
            self._seq = self._ring[-1].seq if self._ring else 0
        for mine in self._devices.values():
            for event in [e for e in mine if e.seq in gone]:
                mine.remove(event)
        if self.store is not None:
            self.store.drop(seqs)

    def _keep(self, event: Event) -> None:
        self._seq = event.seq
        self._ring.append(event)
        mine = self._devices.setdefault(event.slug, deque(maxlen=PER_DEVICE))
        mine.append(event)
        self._devices.move_to_end(event.slug)
        if len(self._devices) > MOST_DEVICES:
            self._devices.popitem(last=False)

    @property
    def last_seq(self) -> int:
        """The number of the newest event."""
        return self._seq

    def mark(self, seqs: Sequence[int], incident: str) -> None:
        """Say that these events are part of an incident."""
        for seq in seqs:
            place = bisect_left(self._ring, seq, key=lambda event: event.seq)
            if place < len(self._ring) and self._ring[place].seq == seq:
                self._ring[place].incident = incident
        if self.store is not None:
            self.store.mark(seqs, incident)
        if self.on_mark is not None:
            self.on_mark(seqs, incident)

    def recent(self) -> Iterable[Event]:
        """What is in memory, oldest first."""
        return iter(self._ring)

    def after(self, since: int, limit: int, wanted: EventFilter = EVERYTHING) -> Page:
        """Of what is in memory: events with seq > since, oldest first, at most `limit`."""
        first = bisect_left(self._ring, since + 1, key=lambda event: event.seq)
        rest = islice(self._ring, first, None)
        found = list(islice((event for event in rest if wanted.admits(event)), limit))
        # Fewer than asked for: the rest was looked at, so that nobody has to look at it again.
        return found, found[-1].seq if len(found) == limit else max(since, self._seq)

    async def page(self, since: int, limit: int, wanted: EventFilter = EVERYTHING) -> Page:
        """As `after`, the store included. Raises WatchdogError when the store can't be read."""
        oldest = self._ring[0].seq if self._ring else self._seq + 1
        found: list[Event] = []
        if not self.is_copied:
            since = min(since, self._seq)
        if self.store is not None and since + 1 < oldest:
            found, since = await self.store.select(since, oldest, limit, wanted)
        if len(found) < limit:
            more, since = self.after(since, limit - len(found), wanted)
            found += more
        return found, since

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
