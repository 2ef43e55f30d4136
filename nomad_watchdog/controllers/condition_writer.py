"""Writes the conditions of devices to the registry when one begins, changes or ends, but not for each report.

Changes are gathered per device, so that ten thousand devices that go offline at once take a few transactions. Only the
holder of a device's shard writes, each record by compare-and-set.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Final

from nomad_watchdog.errors import TransientError, UserError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.logs import Lasting
from nomad_watchdog.model import DeviceRecord, Monotonic
from nomad_watchdog.replicas.leases import Leases
from nomad_watchdog.replicas.ownership import ShardOwnership

log = logging.getLogger(__name__)

GATHER_S: Final = 0.2
"""Conditions are gathered for this time before they are written."""
MAX_BATCH: Final = 1_000
"""Maximum number of records in one commit."""
CHECK_EVERY_S: Final = 5.0
"""Interval at which it is checked whether a shard has become ours."""
RETRY_S: Final = (0.5, 10.0)
"""First and longest wait after the registry failed, seconds."""


class ConditionWriter:
    """Writes the conditions of one replica's devices."""

    def __init__(self, fleet: Fleet, ownership: ShardOwnership, leases: Leases) -> None:
        self._fleet = fleet
        self._ownership = ownership
        self._leases = leases

    async def run(self) -> None:
        """Write until cancelled, with retries while the registry is not available."""
        news, delay_s = self._fleet.verdicts.conditions.news, RETRY_S[0]
        trouble = Lasting(log, "conditions not written")
        while True:
            try:
                async with asyncio.timeout(CHECK_EVERY_S):
                    await news.wait()
            except TimeoutError:
                pass
            else:
                await asyncio.sleep(GATHER_S)
            news.clear()
            try:
                lost = await self.write()
            except WatchdogError as error:
                trouble.goes_on(self._fleet.clock.monotonic(), str(error))
                retry_s = error.retry_after_s if isinstance(error, TransientError) else None
                jitter = random.uniform(0.5, 1.0)  # noqa: S311
                await asyncio.sleep(retry_s or jitter * delay_s)
                delay_s = min(2 * delay_s, RETRY_S[1])
                news.set()
            else:
                trouble.over(self._fleet.clock.monotonic())
                delay_s = RETRY_S[0]
                if lost:
                    news.set()

    async def write(self) -> int:
        """Write the pending conditions of our devices; how many lost their compare-and-set and must be retried.

        Raises as `Registry.commit`."""
        fleet = self._fleet
        ours = self._ownership.shards()
        waiting = fleet.verdicts.conditions.slugs()
        others = [slug for slug in waiting if self._ownership.shard(slug) not in ours]
        then = Monotonic(fleet.clock.monotonic() - fleet.limits.report_stale_s)
        fleet.verdicts.conditions.forget_before(then, others)
        mine = iter([slug for slug in waiting if self._ownership.shard(slug) in ours])
        lost = 0
        while batch := list(islice(mine, MAX_BATCH)):
            wanted = [
                replace(record, condition=fleet.verdicts.condition(record))
                for slug in batch
                if (record := fleet.records.get(slug)) is not None
            ]
            lost += await self._commit(wanted)
        return lost

    async def _commit(self, wanted: Sequence[DeviceRecord]) -> int:
        if not wanted:
            return 0
        fleet = self._fleet
        guards = self._leases.guards([record.slug for record in wanted])
        try:
            with fleet.verdicts.conditions.writing(wanted):
                stored = await fleet.records.commit(wanted, guards)
                fleet.records.learn([record for record in stored if record is not None])
        except UserError as error:
            if len(wanted) > 1:  # one that can't be stored must not hold up the others (S9)
                return sum([await self._commit([record]) for record in wanted])
            log.warning(
                "condition not stored", extra={"slug": wanted[0].slug, "reason": str(error)}
            )
            fleet.verdicts.conditions.park(wanted[0])
            return 0
        lost = [record.slug for record, one in zip(wanted, stored, strict=True) if one is None]
        for slug in lost:
            fresh = await fleet.registry.get(slug)
            fleet.records.learn([fresh] if fresh is not None else [])
        return len(lost)
