"""Keeps the view of all records, as the informer keeps that of all placements: it reads the registry, then
follows its watch, and reads anew when the watch may have missed something.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Final

from nomad_watchdog.controllers.migration import MigrationController
from nomad_watchdog.core.registry_rollback import RegistryRollback
from nomad_watchdog.errors import TransientError, UserError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.logs import Lasting
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import DeviceRecord
from nomad_watchdog.registry import RegistrySnapshot
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.units import utc

log = logging.getLogger(__name__)

DOUBT_EVERY_S: Final = 5.0
"""Twice so long, at most, a store that was put back may look like a watch that is late."""
AGAIN_S: Final = 1.0
"""From a failed read to the next one."""
MAX_IDS: Final = 100
"""Devices in the data of an event."""


class RecordInformer:
    """Gives the fleet each snapshot of the registry, and then tells `taken` whether it was news."""

    def __init__(
        self,
        fleet: Fleet,
        ownership: ShardOwnership,
        metrics: Metrics,
        taken: Callable[[bool], None],
        migrations: MigrationController,
    ) -> None:
        self.fleet = fleet
        self.ownership = ownership
        self.metrics = metrics
        self.has_read = False
        """Whether the registry has been read since this process began."""
        self._taken = taken
        self._migrations = migrations
        self._behind: int | None = None
        self._doubted = asyncio.Event()
        self._trouble = Lasting(log, "registry can't be read")
        self._lost: tuple[DeviceRecord, ...] = ()
        """Records that the last snapshot left out without proof that the registry went back in time."""
        self._older_pauses = False
        self._restored = ""
        fleet.presence.pauses.went_back.connect(self._pauses_went_back)
        fleet.views.add_status(lambda: {"registry_restored": self._restored})

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        while True:
            self._doubted.clear()
            try:
                await self.read()
                self._readable()
                await self._follow()
            except WatchdogError as error:
                # The last view stands; nothing is stopped for want of a registry (L3).
                await self._failed(error)
                await asyncio.sleep(AGAIN_S)

    def doubt_at_once(self) -> None:
        """Have everything read anew now. A watch that waits may show nothing for long: neither lost rights nor
        a restored store always end it."""
        self._doubted.set()

    async def _follow(self) -> None:
        """Take what the watch shows until it fails or is doubted."""
        following = asyncio.ensure_future(self._take_all())
        doubted = asyncio.ensure_future(self._doubted.wait())
        try:
            await asyncio.wait({following, doubted}, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                await following
        finally:
            following.cancel()
            doubted.cancel()
            await asyncio.gather(following, doubted, return_exceptions=True)

    async def _take_all(self) -> None:
        async with aclosing(
            self.fleet.registry.watch(self.fleet.records.index)  # type: ignore[type-var]
        ) as snapshots:
            async for snapshot in snapshots:
                if snapshot.index >= self.fleet.records.index:
                    self._take(snapshot)
                    continue
                # overtaken by a read, or another history: only a fresh read tells
                await self.read()

    async def _failed(self, error: WatchdogError) -> None:
        try:
            await self.fleet.registry.installation()
        except WatchdogError as cause:
            # A UserError is a store without our sentinel: another one, or a wiped one.
            self._note_failure(cause, gone=isinstance(cause, UserError) and self.has_read)
        else:
            self._note_failure(error, gone=False)

    def _note_failure(self, error: WatchdogError, *, gone: bool) -> None:
        fleet, known = self.fleet, len(self.fleet.records)
        self._trouble.goes_on(fleet.clock.monotonic(), str(error))
        self.metrics.registry_unreadable(True)
        if gone:
            if not fleet.readiness.registry_gone:
                log.error("registry is gone", extra={"reason": str(error), "known": known})
                self._note("registry.gone", str(error), known=known)
            fleet.readiness.registry_gone = (
                f"the registry was wiped or replaced while the service ran; {known} devices are known here, "
                "and their agents keep running. Bring the records back with `nomad-watchdog registry "
                "import FILE`. Without a backup, save what this service still knows with `nomad-watchdog "
                f"devices export` before you restart it. ({error})"
            )
            return
        if not isinstance(error, TransientError):
            if not fleet.readiness.registry_unreadable:
                self._note("registry.unreadable", str(error), known=known)
            fleet.readiness.registry_unreadable = True
        fleet.readiness.registry_problem = f"the registry can't be read: {error}"

    def _readable(self) -> None:
        """The registry has just been read."""
        fleet = self.fleet
        lasted_s = self._trouble.over(fleet.clock.monotonic())
        if fleet.readiness.registry_gone or fleet.readiness.registry_unreadable:
            text = f"the registry can be read again, after {lasted_s:g} s"
            self._note("registry.readable", text, lasted_s=lasted_s)
        self.metrics.registry_unreadable(False)
        fleet.readiness.registry_gone = fleet.readiness.registry_problem = ""
        fleet.readiness.registry_unreadable = False

    async def read(self) -> None:
        """Read the registry in full. Raises as `Registry.read`."""
        began = self.fleet.clock.monotonic()
        await (
            self.fleet.presence.pauses.refresh()
        )  # before anything is decided about a paused device
        await self._migrations.refresh()  # or about one whose agent lives elsewhere
        with suppress(UserError):  # only first starts need it, and those read it again
            await self.fleet.records.read_floor()
        snapshot = await self.fleet.records.reread()
        if snapshot is not None:
            self._take(snapshot)
        # Of two reads at once the older may end last, and a shard that the younger has freed would be
        # nobody's again until the next lease changes.
        self.ownership.registry_read_at = max(self.ownership.registry_read_at, began)

    async def doubt(self) -> None:
        """Read the registry anew when its watch has shown less than we know for a whole period: a store
        that was put back to just before our last write shows nothing more until somebody writes. And when
        the last answer left out what we knew: the watch won't show it again either."""
        fleet = self.fleet
        behind = fleet.records.index if fleet.records.index < fleet.records.reached else None
        if fleet.records.vanished or (behind is not None and behind == self._behind):
            why = (
                "it left out what was known"
                if fleet.records.vanished
                else "its watch is behind our writes"
            )
            log.warning("registry read anew", extra={"reason": why})
            self.doubt_at_once()
        self._behind = behind

    def _pauses_went_back(self) -> None:
        self._older_pauses = True
        self.doubt_at_once()

    def _take(self, snapshot: RegistrySnapshot) -> None:
        # The registry shows us our own writes too: those are no reason to go through the fleet again.
        news = self.fleet.records.reset(snapshot.records, snapshot.index, snapshot.unreadable)
        self.metrics.poisoned(len(self.fleet.registry.poisoned))
        first, self.has_read = not self.has_read, True
        self._readable()
        self._note_setback()
        self._taken(news or first)

    def _note_setback(self) -> None:
        """Report a registry that went back in time."""
        fleet = self.fleet
        found = fleet.records.setback or RegistryRollback(
            missing=tuple(record for record in self._lost if record.slug not in fleet.records)
        )
        self._lost = (
            () if fleet.records.setback is not None or found.missing else fleet.records.vanished
        )
        found = replace(found, pauses=self._older_pauses)
        self._older_pauses = False
        if found == RegistryRollback():
            return
        self.metrics.registry_restored()
        log.error("registry went back in time", extra={"reason": found.text})
        self._restored = f"{utc(fleet.clock.wall())}: {found.text}"
        before = (*found.older, *found.missing)
        ids = sorted(record.device.id for record in before)
        self._note(
            "registry.restored",
            found.text,
            older=len(found.older),
            missing=len(found.missing),
            pauses=found.pauses,
            index=max((record.index for record in before), default=fleet.records.index),
            devices=ids[:MAX_IDS],
        )

    def _note(self, kind: str, text: str, **data: object) -> None:
        self.fleet.events.note_fleet(kind, text, data)
