"""Static inventories: files that list devices. The registry follows the last valid content of each file.

The signature of each file is checked every second, so that a rename over it, a changed link and an edit in place are
all noticed. A file is read once two checks agree: then it is written completely. A file that is invalid, empty or
missing changes nothing. Devices that are no longer in a valid file leave, at most as many at once as S7 allows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.controllers import inventory_file
from nomad_watchdog.controllers.expiry import ExpiryController
from nomad_watchdog.controllers.inventory_file import ChangingError, Signature
from nomad_watchdog.core.inventory_diff import compare
from nomad_watchdog.errors import UserError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Departure, Device, DeviceRecord

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
COMPARE_EVERY_S: Final = 5.0
"""Interval at which the registry is compared with the last valid file."""
BATCH: Final = 500
MAX_LISTED: Final = 20


def source_of(path: str) -> str:
    """The source of the records of a file."""
    return f"inventory:{path}"


@dataclass(slots=True)
class _File:
    path: str
    seen: Signature | None = None
    """At the last check."""
    tried: Signature | None = None
    """Of the content that was read last, valid or not."""
    listed: dict[Slug, Device] | None = None
    """The last valid content; None until there was one."""
    problem: str = ""
    conflicts: tuple[str, ...] = ()


class InventoryController:
    """Makes the registry follow the configured files."""

    def __init__(
        self,
        paths: Sequence[str],
        fleet: Fleet,
        departures: ExpiryController,
        metrics: Metrics,
        classes: Collection[str] | None = None,
    ) -> None:
        self.classes: Collection[str] | None = None
        self.fleet = fleet
        self.departures = departures
        self.metrics = metrics
        self.files: list[_File] = []
        self._now = asyncio.Event()
        self.configure(paths, classes)
        fleet.views.add_status(self.status)

    def configure(self, paths: Sequence[str], classes: Collection[str] | None) -> None:
        """Follow these files from now on. The devices of a file that is no longer followed stay registered,
        and can then be changed through the API. `classes`: those that a device may have; None = any."""
        if classes != self.classes:
            self.classes = classes
            self.reread()  # a valid file may be invalid now, and the other way round
        known = {file.path: file for file in self.files}
        self.files = [known.get(path) or _File(path) for path in paths]
        self.fleet.presence.inventories = frozenset(map(source_of, paths))
        self._now.set()

    def reread(self) -> None:
        """Read every file again, changed or not (SIGHUP)."""
        for file in self.files:
            file.tried = None
        self._now.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        await self.fleet.readiness.event.wait()
        clock, due = self.fleet.clock, float("-inf")
        while True:
            changed = [await self._poll(file) for file in self.files]
            if any(changed) or clock.monotonic() >= due:
                await self._follow()
                due = clock.monotonic() + COMPARE_EVERY_S
            try:
                async with asyncio.timeout(POLL_S if self.files else None):
                    await self._now.wait()
            except TimeoutError:
                pass
            self._now.clear()

    async def _poll(self, file: _File) -> bool:
        """Whether there is new valid content."""
        try:
            found = await asyncio.to_thread(inventory_file.signature, file.path)
        except UserError as error:
            file.seen = file.tried = None
            self._set_problem(file, str(error))
            return False
        try:
            before, file.seen = file.seen, found
            if found == file.tried or found != before:
                return False
            file.listed = await asyncio.to_thread(
                inventory_file.read, file.path, found, self.classes
            )
        except ChangingError:
            return False
        except UserError as error:
            file.tried = found
            self._set_problem(file, str(error))
            return False
        file.tried = found
        self._set_problem(file, "")
        return True

    def _set_problem(self, file: _File, problem: str) -> None:
        problem = "; ".join(problem.splitlines())
        if problem == file.problem:
            return
        file.problem = problem
        text = problem or f"{file.path} is valid again"
        log.warning("inventory", extra={"file": file.path, "reason": text})
        self._note("inventory.bad" if problem else "inventory.good", text)

    def _note(self, kind: str, text: str, **data: object) -> None:
        self.fleet.events.note_fleet(kind, text, data)

    async def _follow(self) -> None:
        for file in self.files:
            if file.listed is not None:
                try:
                    await self._apply(file, file.listed)
                except WatchdogError as error:
                    log.warning(
                        "inventory not followed", extra={"file": file.path, "reason": str(error)}
                    )
        self.metrics.inventories(
            problems=sum(bool(file.problem) for file in self.files),
            conflicts=sum(len(file.conflicts) for file in self.files),
        )

    async def _apply(self, file: _File, listed: dict[Slug, Device]) -> None:
        fleet, source = self.fleet, source_of(file.path)
        # Every replica reads the files, and applies them to the devices that it decides about.
        ours = self.departures.ownership.of
        changes = compare(ours(listed), ours(fleet.records), source, fleet.presence.inventories)
        if changes.conflicts and changes.conflicts != file.conflicts:
            self._note(
                "inventory.conflict",
                f"{file.path}: {len(changes.conflicts)} listed devices belong to another source",
                devices=list(changes.conflicts[:MAX_LISTED]),
            )
        file.conflicts = changes.conflicts

        def still(record: DeviceRecord) -> bool:
            return record.source == source

        await self.departures.leave(source, changes.depart, Departure.REMOVED, still=still)
        for first in range(0, len(changes.register), BATCH):
            await fleet.records.register(changes.register[first : first + BATCH], source)

    def status(self) -> dict[str, object]:
        """For the status."""
        return {
            "inventory": [
                {
                    "file": file.path,
                    "devices": None if file.listed is None else len(file.listed),
                    "problem": file.problem,
                    "conflicts": len(file.conflicts),
                    "conflicting": list(file.conflicts[:MAX_LISTED]),
                }
                for file in self.files
            ]
        }
