"""Keeps the view of all records, as the informer keeps that of all placements: it reads the registry, then
follows its watch, and reads anew when the watch may have missed something.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.migrations import Migrations
from nomad_watchdog.registry import RegistrySnapshot
from nomad_watchdog.territory import Territory

log = logging.getLogger(__name__)

DOUBT_EVERY_S: Final = 5.0
"""Twice so long, at most, a store that was put back may look like a watch that is late."""


class Follower:
    """Gives the fleet each snapshot of the registry, and then tells `taken` whether it was news."""

    def __init__(
        self,
        fleet: Fleet,
        territory: Territory,
        metrics: Metrics,
        taken: Callable[[bool], None],
        migrations: Migrations,
    ) -> None:
        self.fleet = fleet
        self.territory = territory
        self.metrics = metrics
        self.has_read = False
        """Whether the registry has been read since this process began."""
        self._taken = taken
        self._migrations = migrations
        self._behind: int | None = None

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        while True:
            try:
                await self.read()
                async for snapshot in self.fleet.registry.watch(self.fleet.index):
                    self._take(snapshot)
            except WatchdogError as error:
                # The last view stands; nothing is stopped for want of a registry (L3).
                log.warning("registry watch failed", extra={"reason": str(error)})
                self.fleet.ready_reason = str(error)
                await asyncio.sleep(1.0)

    async def read(self) -> None:
        """Read the registry in full. Raises as `Registry.read`."""
        began = self.fleet.clock.monotonic()
        await self.fleet.pauses.refresh()  # before anything is decided about a paused device
        await self._migrations.refresh()  # or about one whose agent lives elsewhere
        snapshot = await self.fleet.reread()
        if snapshot is not None:
            self._take(snapshot)
        # Of two reads at once the older may end last, and a shard that the younger has freed would be
        # nobody's again until the next lease changes.
        self.territory.registry_read_at = max(self.territory.registry_read_at, began)

    async def doubt(self) -> None:
        """Read the registry anew when its watch has shown less than we know for a whole period: a store
        that was put back to just before our last write shows nothing more until somebody writes. And when
        the last answer left out what we knew: the watch won't show it again either."""
        fleet = self.fleet
        behind = fleet.index if fleet.index < fleet.reached else None
        if fleet.shrunk or (behind is not None and behind == self._behind):
            why = "it left out what was known" if fleet.shrunk else "its watch is behind our writes"
            log.warning("registry read anew", extra={"reason": why})
            try:
                await self.read()
            except WatchdogError as error:
                log.warning("registry read failed", extra={"reason": str(error)})
        self._behind = behind

    def _take(self, snapshot: RegistrySnapshot) -> None:
        # The registry shows us our own writes too: those are no reason to go through the fleet again.
        news = self.fleet.reset(snapshot.records, snapshot.index, snapshot.unreadable)
        self.metrics.poisoned(len(self.fleet.registry.poisoned))
        first, self.has_read = not self.has_read, True
        self._taken(news or first)
