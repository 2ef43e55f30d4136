"""Fencing: what an action may act on. A start or a replacement commits its epoch before anything is started (S2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from nomad_watchdog import failpoints
from nomad_watchdog.core import presence
from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.errors import DamagedError, FencedError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import NEVER, DeviceRecord, Epoch
from nomad_watchdog.replicas.leases import Leases, check

Fenced = DeviceRecord | WatchdogError | None
"""The stored record that an action may act on, or why it may not; None for an unknown placement without a record."""
_CHANGED: Final = "the record has changed since the decision"


class Fence:
    """Commits the epochs of actions, and reads the records of the others again."""

    def __init__(self, fleet: Fleet, leases: Leases) -> None:
        self._fleet, self._leases = fleet, leases

    async def pass_all(self, batch: Sequence[Action]) -> list[Fenced]:
        """What each action may act on. All epochs are committed in one transaction.

        Raises what the registry raises; then no action may act, whatever was committed."""
        results: list[Fenced] = [None] * len(batch)
        commits: list[tuple[int, DeviceRecord]] = []
        # Read after the records are known, not from memory (`core.tombstones`).
        is_needed = any(map(self._is_first, batch))
        floor = await self._fleet.records.try_floor() if is_needed else EpochFloor()
        for position, action in enumerate(batch):
            try:
                wanted = self._advanced(action, floor)
            except WatchdogError as error:
                results[position] = error
                continue
            if wanted is None:
                results[position] = await self._reread(action)
            else:
                commits.append((position, wanted))
        for (position, _), stored in zip(commits, await self._commit(commits), strict=True):
            results[position] = stored
        return results

    def _advanced(self, action: Action, floor: EpochFloor | DamagedError) -> DeviceRecord | None:
        """The record with the action's epoch, to be committed; None = it has that epoch, or the action needs none.
        Raises FencedError when the action is out of date, and a damaged floor when it would start a first agent."""
        check(self._leases, action.slug)
        known = self._fleet.records.get(action.slug)
        if known is None:
            if action.kind is not ActionKind.RETIRE:
                raise FencedError("the record is not known any more")
            return None
        if known.index != action.index:
            raise FencedError(_CHANGED)
        target = _epoch_after(action)
        if target <= known.epoch:
            return None
        if isinstance(floor, EpochFloor):
            target = floor.first(known, target)
        elif known.epoch == NEVER:
            raise floor
        return presence.advance(known, target, action.home)

    async def _commit(self, commits: Sequence[tuple[int, DeviceRecord]]) -> Sequence[Fenced]:
        if not commits:
            return ()
        records = [record for _, record in commits]
        guards = self._leases.guards([record.slug for record in records])
        stored = await self._fleet.records.commit(records, guards)
        failpoints.reached("K5")
        return [
            await self._lost(wanted.slug) if record is None else self._learned(record)
            for wanted, record in zip(records, stored, strict=True)
        ]

    def _learned(self, record: DeviceRecord) -> DeviceRecord:
        self._fleet.records.learn([record])
        return record

    async def _lost(self, slug: Slug) -> FencedError:
        fresh = await self._fleet.registry.get(slug)
        self._fleet.records.learn([fresh] if fresh is not None else [])
        return FencedError("another writer has changed the record")

    async def _reread(self, action: Action) -> DeviceRecord | FencedError | None:
        """The record as it is now: the desired state may have changed since the decision (S8)."""
        fresh = await self._fleet.registry.get(action.slug)
        if (fresh.index if fresh is not None else 0) != action.index:
            self._fleet.records.learn([fresh] if fresh is not None else [])
            return FencedError(_CHANGED)
        return fresh

    def _is_first(self, action: Action) -> bool:
        known = self._fleet.records.get(action.slug)
        return known is not None and known.epoch == NEVER


def _epoch_after(action: Action) -> Epoch:
    match action.kind:
        case ActionKind.START:
            return action.epoch
        case ActionKind.REPLACE:
            return Epoch(action.epoch + 1)
        case ActionKind.RETIRE:
            return Epoch(0)
