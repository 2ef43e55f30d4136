"""Two files as one store: audit events have a file of their own, so that no other event displaces them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from heapq import merge

from nomad_watchdog.events._sql import Found
from nomad_watchdog.events.log import Event, EventFilter, Page, is_audit
from nomad_watchdog.events.store import EventStore


class SplitStore:
    """`events`: for everything but the audit. Each has its own queue, file, size and age; the numbers are
    those of one history."""

    def __init__(self, events: EventStore, audit: EventStore) -> None:
        self.events, self.audit = events, audit

    @property
    def left_open(self) -> dict[str, tuple[str, float]]:
        """As `EventStore.left_open`."""
        return self.events.left_open

    async def open(self) -> Found:
        """As `EventStore.open`; the audit file gets the origin of the other one."""
        found = await self.events.open()
        self.audit.origin = found.origin
        more = await self.audit.open()
        both = merge(found.events, more.events, key=lambda event: event.seq)
        origins = dict(more.origins)
        for origin, number in found.origins:
            origins[origin] = max(number, origins.get(origin, 0))
        return Found(
            found.origin,
            max(found.seq, more.seq),
            tuple(both),
            found.left_open,
            found.verdicts,
            tuple(origins.items()),
        )

    def put(self, event: Event) -> None:
        """As `EventStore.put`."""
        (self.audit if is_audit(event.kind) else self.events).put(event)

    def mark(self, seqs: Sequence[int], incident: str) -> None:
        """As `EventStore.mark`: no audit event is part of an incident."""
        self.events.mark(seqs, incident)

    def drop(self, seqs: Sequence[int]) -> None:
        """As `EventStore.drop`."""
        self.events.drop(seqs)
        self.audit.drop(seqs)

    def status(self) -> dict[str, object]:
        """As `EventStore.status`, of both."""
        one, other = self.events.status(), self.audit.status()
        reasons = {str(one["reason"]): None, str(other["reason"]): None}
        return {
            "stored": bool(one["stored"] and other["stored"]),
            "reason": "; ".join(filter(None, reasons)),
            "dropped": self.events.dropped + self.audit.dropped,
            "waiting": self.events.waiting + self.audit.waiting,
        }

    async def select(self, since: int, before: int, limit: int, wanted: EventFilter) -> Page:
        """As `EventStore.select`. An audit event of an older version may be in either file."""
        pages = await asyncio.gather(
            self.events.select(since, before, limit, wanted),
            self.audit.select(since, before, limit, wanted),
        )
        found = list(merge(*(events for events, _ in pages), key=lambda event: event.seq))[:limit]
        return found, found[-1].seq if len(found) == limit else before - 1

    async def close(self) -> None:
        """As `EventStore.close`."""
        await asyncio.gather(self.events.close(), self.audit.close())
