"""Reads the scheduler's statistics of the hosts whose pressure can't be read. Only the leader does so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.host_pressure import HostUsage
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import Scheduler, host_usage

log = logging.getLogger(__name__)

POLL_S: Final = 30.0
MAX_PAUSE_S: Final = 600.0
"""Longest pause, which doubles while nothing can be read: the right to read it may be missing."""
MAX_HOSTS: Final = 200
"""Maximum number of hosts that are read; the others have no statistics."""


class HostUsageController:
    """The statistics of the hosts of one fleet."""

    def __init__(self, fleet: Fleet, scheduler: Scheduler, ownership: ShardOwnership) -> None:
        self._fleet, self._scheduler, self._ownership = fleet, scheduler, ownership
        self._pause_s = POLL_S

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            await asyncio.sleep(self._pause_s)
            await self.poll()

    async def poll(self) -> None:
        """Read once. No call to the scheduler while the pressure of all hosts can be read, or on another replica."""
        pressures = self._fleet.pressures
        hosts = pressures.blind()[:MAX_HOSTS] if self._ownership.may_lead() else []
        found: Mapping[str, HostUsage] = {}
        try:
            async with asyncio.timeout(POLL_S):
                found = await host_usage(self._scheduler, hosts) if hosts else {}
        except (WatchdogError, TimeoutError) as error:
            log.debug("host statistics not read", extra={"reason": str(error)})
        else:
            pressures.used(found)
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S) if hosts and not found else POLL_S
