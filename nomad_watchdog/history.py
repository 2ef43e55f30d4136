"""The last events, in memory and bounded (S9)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import WallTime

MOST_EVENTS: Final = 10_000
MOST_DEVICES: Final = 2_000
PER_DEVICE: Final = 12


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. `seq` goes up by one; a gap means that older ones were dropped."""

    seq: int
    at: WallTime
    kind: str
    device_id: str
    slug: Slug
    text: str
    data: Mapping[str, object]

    def shown(self) -> dict[str, object]:
        """For JSON."""
        return {
            "seq": self.seq,
            "at": self.at,
            "kind": self.kind,
            "device": self.device_id,
            "slug": self.slug,
            "text": self.text,
            **({"data": dict(self.data)} if self.data else {}),
        }


@dataclass(slots=True)
class History:
    """A ring of events, and the last few of each device that had any lately."""

    _ring: deque[Event] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    _devices: OrderedDict[Slug, deque[Event]] = field(default_factory=OrderedDict)
    _seq: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(
        self,
        *,
        at: WallTime,
        kind: str,
        device_id: str,
        slug: Slug,
        text: str,
        data: Mapping[str, object],
    ) -> None:
        """Append one; the oldest falls out."""
        self._seq += 1
        event = Event(self._seq, at, kind, device_id, slug, text, data)
        self._ring.append(event)
        mine = self._devices.setdefault(slug, deque(maxlen=PER_DEVICE))
        mine.append(event)
        self._devices.move_to_end(slug)
        if len(self._devices) > MOST_DEVICES:
            self._devices.popitem(last=False)
        self._news.set()

    def after(self, since: int, limit: int) -> tuple[list[Event], int]:
        """Events with seq > since, oldest first, at most `limit`; and the last seq given (or since)."""
        first = self._ring[0].seq if self._ring else self._seq + 1
        skip = max(0, since + 1 - first)
        found = list(islice(self._ring, skip, skip + limit))
        return found, found[-1].seq if found else min(since, self._seq)

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
