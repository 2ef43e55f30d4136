"""Checks that the registry can be written, before a device is added or an agent has to be replaced."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from nomad_watchdog.errors import TerminalError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.logs import Lasting
from nomad_watchdog.metrics import Metrics

log = logging.getLogger(__name__)

EVERY_S: Final = 5.0
"""Time between two checks, seconds."""


class RegistryWrites:
    """Sets `FleetReadiness.registry_unwritable`."""

    def __init__(self, fleet: Fleet, metrics: Metrics) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._trouble = Lasting(log, "registry can't be written")

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(EVERY_S)

    async def check(self) -> None:
        """Check once. A time-out leaves the last result as it is."""
        try:
            await self._fleet.registry.check_writable()
        except TerminalError as error:
            self._on_refused(str(error))
        except WatchdogError:
            return
        else:
            self._on_accepted()

    def _on_refused(self, why: str) -> None:
        fleet = self._fleet
        self._trouble.goes_on(fleet.clock.monotonic(), why)
        self._metrics.registry_unwritable(True)
        if not fleet.readiness.registry_unwritable:
            self._note("registry.unwritable", why)
        fleet.readiness.registry_unwritable = (
            "the registry can be read and not written: no device can be added or removed, and no agent started "
            f"or replaced; running agents continue. ({why})"
        )

    def _on_accepted(self) -> None:
        fleet = self._fleet
        lasted_s = self._trouble.over(fleet.clock.monotonic())
        if fleet.readiness.registry_unwritable:
            text = f"the registry can be written again, after {lasted_s:g} s"
            self._note("registry.writable", text, lasted_s=lasted_s)
        fleet.readiness.registry_unwritable = ""
        self._metrics.registry_unwritable(False)

    def _note(self, kind: str, text: str, **data: object) -> None:
        self._fleet.events.note_fleet(kind, text, data)
