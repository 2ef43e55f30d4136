"""A keyed queue: one entry a device, the newest wins, nobody works on one device twice at a time.

Two lanes: a single event goes through the urgent lane and is not stuck behind a storm (L4). An entry
may wait for its time (back-off). Nothing here costs a task or a timer per device: one heap of times.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from nomad_watchdog.clock import Clock
from nomad_watchdog.model import Monotonic

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

URGENT_SHARE: Final = 4
"""Of five takes, at least one is for the bulk lane while it has entries, so that it is not starved."""


@dataclass(slots=True)
class _Entry(Generic[V]):
    item: V
    urgent: bool
    added_at: Monotonic


@dataclass(slots=True)
class WorkQueue(Generic[K, V]):
    """At most one waiting item a key, and at most one in work."""

    clock: Clock
    _waiting: dict[K, _Entry[V]] = field(default_factory=dict)
    _lanes: tuple[dict[K, None], dict[K, None]] = field(default_factory=lambda: ({}, {}))
    _later: list[tuple[float, int, K]] = field(default_factory=list)
    _not_before: dict[K, float] = field(default_factory=dict)
    _active: dict[K, _Entry[V]] = field(default_factory=dict)
    """Keys in work, and their items."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _takes: int = 0
    _sequence: int = 0

    def put(self, key: K, item: V, *, urgent: bool = False) -> None:
        """Add or replace the item of key. It keeps its place, or moves up into the urgent lane."""
        old = self._waiting.get(key)
        if old is not None:
            old.item = item
            if urgent and not old.urgent:
                old.urgent = True
                if self._lanes[1].pop(key, self) is None:
                    self._lanes[0][key] = None
            return
        self._waiting[key] = _Entry(item, urgent, self.clock.monotonic())
        self._offer(key)

    def drop(self, key: K) -> None:
        """Forget the waiting item of key, if any; work under way goes on."""
        if self._waiting.pop(key, None) is not None:
            self._lanes[0].pop(key, None)
            self._lanes[1].pop(key, None)

    def retain(self, keys: set[K]) -> None:
        """Forget what waits for other keys: a newer plan no longer asks for it."""
        for key in self._waiting.keys() - keys:
            self.drop(key)

    def delay(self, key: K, not_before: Monotonic) -> None:
        """Nothing is taken for key before that time; a later call replaces an earlier one."""
        self._not_before[key] = not_before
        if key in self._waiting:
            for lane in self._lanes:
                lane.pop(key, None)
            self._offer(key)

    def _offer(self, key: K) -> None:
        if key in self._active:
            return
        due = self._not_before.get(key, 0.0)
        if due > self.clock.monotonic():
            self._sequence += 1
            heapq.heappush(self._later, (due, self._sequence, key))
        else:
            self._not_before.pop(key, None)
            entry = self._waiting[key]
            self._lanes[0 if entry.urgent else 1][key] = None
        self._changed.set()

    def _promote_due(self) -> None:
        now = self.clock.monotonic()
        while self._later and self._later[0][0] <= now:
            _, _, key = heapq.heappop(self._later)
            if key in self._waiting and self._not_before.get(key, 0.0) <= now:
                self._offer(key)

    def take_nowait(self, most: int, *, urgent_only: bool = False) -> list[tuple[K, V]]:
        """Up to `most` items that are due, urgent ones first; call `done` for each."""
        self._promote_due()
        taken: list[tuple[K, V]] = []
        urgent, bulk = self._lanes
        if urgent_only:
            bulk = {}
        while len(taken) < most and (urgent or bulk):
            self._takes += 1
            lane = urgent if urgent and (not bulk or self._takes % (URGENT_SHARE + 1)) else bulk
            key = next(iter(lane))
            del lane[key]
            entry = self._waiting.pop(key)
            self._active[key] = entry
            taken.append((key, entry.item))
        return taken

    async def take(self, most: int = 1, *, urgent_only: bool = False) -> list[tuple[K, V]]:
        """Wait until something is due, then as `take_nowait`."""
        while True:
            self._changed.clear()
            taken = self.take_nowait(most, urgent_only=urgent_only)
            if taken:
                return taken
            due = self._later[0][0] - self.clock.monotonic() if self._later else None
            try:
                async with asyncio.timeout(None if due is None else max(due, 0.001)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: K) -> None:
        """The work on key has ended; what was put meanwhile may be taken now."""
        self._active.pop(key, None)
        if key in self._waiting:
            self._offer(key)

    def is_active(self, key: K) -> bool:
        """Whether somebody works on key now."""
        return key in self._active

    def is_urgent(self, key: K) -> bool:
        """Whether what is worked on came through the urgent lane."""
        return key in self._active and self._active[key].urgent

    def in_hand(self) -> list[V]:
        """The items that are being worked on."""
        return [entry.item for entry in self._active.values()]

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def in_work(self) -> int:
        """How many keys are being worked on."""
        return len(self._active)

    def oldest_s(self) -> float:
        """Age in seconds of the oldest waiting item that is due; 0 when there is none."""
        heads = [next(iter(lane)) for lane in self._lanes if lane]
        if not heads:
            return 0.0
        now = self.clock.monotonic()
        return max(now - self._waiting[key].added_at for key in heads)

    def wait_s(self, key: K) -> float:
        """Seconds until key may be taken; 0 when it may be now."""
        return max(0.0, self._not_before.get(key, 0.0) - self.clock.monotonic())
