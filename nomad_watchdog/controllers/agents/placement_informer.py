"""Keeps a view of all placements: hints say when to look, a timer and every gap make it look at all.

Level-triggered: a hint carries no state. What counts is a snapshot, full or of the hinted devices, and a
snapshot is complete or an error (L3).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core.resync_schedule import ResyncSchedule
from nomad_watchdog.errors import StaleError, WatchdogError
from nomad_watchdog.fleet.listing_freshness import ListingFreshness
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Monotonic
from nomad_watchdog.schedulers import Scheduler, Snapshot, unchanged_since

log = logging.getLogger(__name__)

_FOLLOWED_S: Final = 1.0
"""The first look waits so long for the watch to begin, seconds."""
_MAX_STILL: Final = 9
"""So many looks in a row may be the scheduler's word that nothing has changed; then all is read again, in
case that what was read was wrong."""


class PlacementInformer:
    """Gives each snapshot to `take`, and each failure in words to `failed`."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        resync_s: float,
        metrics: Metrics,
        take: Callable[[Snapshot], None],
        failed: Callable[[str], None],
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._metrics = metrics
        self._take = take
        self._failed = failed
        self._agenda = ResyncSchedule(resync_s)
        self._news = asyncio.Event()
        self._followed = asyncio.Event()
        self._wakes_at = math.inf
        """When the loop looks into the agenda, if nobody wakes it; inf while it is at work."""
        self._one_at_a_time = asyncio.Lock()
        self._whole: Snapshot | None = None
        self._stills = 0
        self.freshness = ListingFreshness()
        self.began_at = Monotonic(0.0)
        """When the full snapshot that was last begun was begun."""
        self.read_began_at = Monotonic(0.0)
        """The same, of any snapshot."""

    async def run(self) -> None:
        """Look until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._look_for_ever())

    def look_again(self, slugs: AbstractSet[Slug], *, calm: bool = False) -> None:
        """Read the placements of these devices soon. `calm`: what is new there only confirms what we did,
        and in a storm can wait."""
        now = self._clock.monotonic()
        self._agenda.devices(slugs, now, calm=calm)
        if now + self._agenda.wait_s(now) < self._wakes_at:  # seldom, in a storm
            self._news.set()

    def resync(self, reason: str, *, now: bool = False) -> None:
        """Read all placements soon; `now`: without waiting until a storm is worth another snapshot."""
        self._agenda.everything(reason, hurry=now)
        self._news.set()

    @property
    def age_s(self) -> float:
        """Age of the last full snapshot."""
        return self._clock.monotonic() - (self._agenda.full_at or 0.0)

    def look_every(self, resync_s: float) -> None:
        """Read everything at least once in so many seconds from now on."""
        self._agenda.resync_s = resync_s

    @property
    def until_resync_s(self) -> float:
        """Time to the next full snapshot, if no hint asks for one before."""
        return max(0.05, self._agenda.resync_s - self.age_s)

    async def _follow(self) -> None:
        async for hint in self._scheduler.watch():
            self._followed.set()
            if hint.slugs is None:
                self._metrics.resync("hint")
                self.resync("hint")
            else:
                self.look_again(hint.slugs, calm=hint.calm)

    async def _look_for_ever(self) -> None:
        # What happens between a look and the watch's beginning is seen by neither, so that the watch asks for
        # another look: one begun after it is enough.
        with suppress(TimeoutError):
            async with asyncio.timeout(_FOLLOWED_S):
                await self._followed.wait()
        delay_s = 0.0
        while True:
            self._news.clear()
            look = self._agenda.take(self._clock.monotonic())
            if look is None:
                now = self._clock.monotonic()
                wait_s = self._agenda.wait_s(now)
                self._wakes_at = now + wait_s
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._news.wait()
                self._wakes_at = math.inf
                continue
            if look.reason == "timer":
                self._metrics.resync("timer")
            began = self._clock.monotonic()
            try:
                await self.read(look.only, thrifty=look.reason == "timer")
            except WatchdogError as error:
                kind = "stale" if isinstance(error, StaleError) else "transient"
                self._metrics.scheduler_error(kind)
                log.warning("snapshot failed", extra={"reason": str(error)})
                self._failed(str(error))
                self._agenda.failed(look)
                delay_s = min(max(delay_s * 2, 0.25), 10.0)
                await asyncio.sleep(delay_s)
            else:
                self._agenda.done(look, began, self._clock.monotonic())
                delay_s = 0.0

    async def read(self, only: AbstractSet[Slug] | None = None, *, thrifty: bool = False) -> None:
        """Read a snapshot and give it to `take`. One at a time: of two under way at once the older could
        come last, and would hide what the younger has shown (S8). `thrifty`: the last one will do if the
        scheduler says that it has not changed; never as a second read of what is doubted (S7). Raises as
        `Scheduler.snapshot`."""
        async with self._one_at_a_time:
            self.freshness.begins()
            self.read_began_at = self._clock.monotonic()
            if only is None:
                self.began_at = self.read_began_at
            snapshot = await self._unchanged() if thrifty and only is None else None
            if snapshot is None:
                snapshot = await self._scheduler.snapshot(only)
                if only is None:
                    self._whole, self._stills = snapshot, 0
            self.freshness.listed(snapshot.only)
            self._take(snapshot)

    async def _unchanged(self) -> Snapshot | None:
        """The last full snapshot, if the scheduler says that it would be the same now."""
        whole = self._whole
        if (
            whole is None
            or self._stills >= _MAX_STILL
            or not await unchanged_since(self._scheduler, whole)
        ):
            return None
        self._stills += 1
        return whole
