"""Carries out migrations between schedulers: what was requested is one document in the registry.

Every replica reads it before it decides anything. `core.migration` decides which device moves when; the leader
records that a migration is over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Final

from nomad_watchdog.controllers.migration_state import FORMAT, MigrationState, settings_hint
from nomad_watchdog.core import migration, presence
from nomad_watchdog.core.migration import (
    NEVER_MIGRATED,
    BackendAssignment,
    Migration,
    MigrationProgress,
)
from nomad_watchdog.core.placement_gc import REST_S
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.errors import UserError, WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import DeviceRecord, Epoch, Monotonic
from nomad_watchdog.registry.document import Document
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import Scheduler
from nomad_watchdog.schedulers.multi import MultiScheduler

log = logging.getLogger(__name__)

FRESH_S: Final = 5.0
"""The document is read every second. A replica that could not read it for this time decides nothing, and no device
moves within this time after a change: so no replica decides without knowing of both schedulers."""
EMPTY_S: Final = 90.0
"""A scheduler is still listed for this time after its last agent has ended: longer than any request or action that
is older can take (`placement_gc.REST_S`)."""
IDLE_S: Final = 10.0
"""While no migration is in progress, the records are searched for the rest of earlier ones at this interval."""
_TOMBSTONE_BATCH: Final = 64
_LONG_AGO: Final = Monotonic(float("-inf"))


class MigrationController:
    """The migrations of one fleet. They need a `MultiScheduler` as the scheduler; `on_more_schedulers` is called
    when more schedulers than before must be listed."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        ownership: ShardOwnership,
        metrics: Metrics,
        on_more_schedulers: Callable[[], None],
    ) -> None:
        self.ownership = ownership
        self.problem = ""
        """Why the document can't be read now; what was read before stays in force."""
        self._fleet = fleet
        self._scheduler = scheduler if isinstance(scheduler, MultiScheduler) else None
        self._metrics = metrics
        self._on_more_schedulers = on_more_schedulers
        self._document = Document(fleet.registry, FORMAT)
        self._read_at = _LONG_AGO
        self._changed_at = _LONG_AGO
        self._tombstones: dict[Slug, tuple[int, Monotonic]] = {}
        """Of a record that is to be moved after its device left: its index, and since when it is known to have it."""
        self._done_since: Monotonic | None = None
        self._tidied_at = _LONG_AGO
        self._progress: MigrationProgress | None = None
        self._homes_seen: set[str] = set()
        if self.on:
            fleet.views.add_status(self.status)

    @property
    def on(self) -> bool:
        """Whether this fleet can have more than one scheduler."""
        return self._scheduler is not None

    @property
    def state(self) -> MigrationState:
        """As last read."""
        return self._document.value

    def homes(self) -> BackendAssignment:
        """Where agents live and should live."""
        if self._scheduler is None or not self.state.base:
            return NEVER_MIGRATED
        return self.homes_with(self.state.moves)

    def homes_with(self, moves: tuple[Migration, ...]) -> BackendAssignment:
        """Where agents would live and should live with these migrations. Raises as `scheduler`."""
        scheduler = self.scheduler()
        base = self.state.base or scheduler.name
        return BackendAssignment(scheduler.name, base, moves, frozenset(scheduler.parts))

    def scheduler(self) -> MultiScheduler:
        """Raises UserError where no migration is possible."""
        if self._scheduler is None:
            raise UserError("this control plane is configured with one scheduler only")
        return self._scheduler

    def unsure(self, records: Mapping[Slug, DeviceRecord]) -> frozenset[Slug]:
        """Devices for which nothing may be decided, because their agents may be on a scheduler that is not listed."""
        if self._scheduler is None:
            return frozenset()
        if self._is_blind:
            return frozenset(records)
        homes = self.homes()
        known = homes.is_open | {""}
        if homes.base not in known:
            return frozenset(homes.strangers(records))
        if self._homes_seen <= known:
            return frozenset()
        return frozenset(slug for slug, record in records.items() if record.home not in known)

    @property
    def _is_blind(self) -> bool:
        return self._now() - self._read_at > FRESH_S

    def blind(self) -> str:
        """Why nothing is decided for any device now, in words; "" = that is not so."""
        if self._scheduler is None or not self._is_blind:
            return ""
        why = self.problem or "no answer yet"
        return f"nothing is decided: the migrations can't be read from the registry: {why}"

    def seen(self, records: Iterable[DeviceRecord]) -> None:
        """Note the homes that these records name."""
        self._homes_seen |= {record.home for record in records}

    def _now(self) -> Monotonic:
        return self._fleet.clock.monotonic()

    def with_moves(
        self,
        readiness: Readiness,
        homes: BackendAssignment,
        resting: AbstractSet[Slug],
        classes: Container[str],
    ) -> Readiness:
        """The readiness with what a roll-out must know of the migration in progress. `classes`: those that are
        configured."""
        move = homes.active
        if move is None or move.paused:
            return readiness
        if self._now() - self._changed_at <= FRESH_S:
            return replace(readiness, turn=lambda _slug: False)
        fleet, ownership = self._fleet, self.ownership

        def can_move(record: DeviceRecord) -> bool:
            kind = record.device.agent_class
            return record.slug not in resting and kind in classes and kind not in readiness.halted

        turn = migration.frontier(homes, fleet.records, fleet.placements, can_move, ownership.shard)
        return replace(
            readiness,
            turn=lambda slug: turn is not None and ownership.shard(slug) <= turn,
            moving=self.progress(move, homes).on_way,
            moves_at_once=move.at_once,
        )

    def progress(self, move: Migration, homes: BackendAssignment) -> MigrationProgress:
        """How far a migration has come."""
        fleet = self._fleet
        return migration.progress(
            move, homes, fleet.records, fleet.placements, fleet.agents.has_ready_agent
        )

    # -- the document in the registry ------------------------------------------------------------

    async def refresh(self) -> bool:
        """Read the document; whether it has changed. Raises as `Document.refresh`: nothing may be decided then."""
        if self._scheduler is None:
            return False
        began = self._now()
        changed = await self._document.refresh()
        if changed:
            self._apply(self._scheduler)
        self._read_at = Monotonic(max(self._read_at, began))
        return changed

    def _apply(self, scheduler: MultiScheduler) -> None:
        self._changed_at = self._now()
        if self.state.base:
            scheduler.base = self.state.base
        if scheduler.require(self.state.backends):
            self._on_more_schedulers()

    async def change(self, how: Callable[[MigrationState], MigrationState]) -> bool:
        """Store what `how` makes of the stored state; whether that was a change. Durable when it returns. Raises as
        `Document.update`."""
        known = self._document.index
        try:
            return await self._document.update(how)
        finally:
            if self._document.index != known:
                self._apply(self.scheduler())

    async def open_scheduler(self, name: str) -> None:
        """As `MultiScheduler.open`. Earlier listings, without the new scheduler, no longer count."""
        scheduler = self.scheduler()
        is_new = name not in scheduler.parts
        await scheduler.open(name)
        if is_new:
            self._on_more_schedulers()

    # -- control loop ----------------------------------------------------------------------------

    async def poll(self) -> bool:
        """Read the document and, as the leader, record what is over; whether something has changed."""
        try:
            changed = await self.refresh()
            homes = self.homes()
            self._progress = self.progress(homes.active, homes) if homes.active else None
            self._metrics.moving("migration", *self._counts())
            if homes.moves:
                await self._judge(homes)
        except WatchdogError as error:
            if not self.problem:
                log.warning("migration not read", extra={"reason": str(error)})
            self.problem = str(error)
            return False
        self.problem = ""
        return changed

    def _counts(self) -> tuple[int, int, int]:
        """Numbers of devices that have moved and have a ready agent, that are moving, and that wait."""
        now = self._progress or MigrationProgress()
        return now.there - now.on_way, now.on_way, now.covered - now.there

    async def _judge(self, homes: BackendAssignment) -> None:
        if not self._fleet.readiness.ready or not self.ownership.may_lead():
            self._done_since = None
            return
        if homes.active is not None:
            self._done_since = None
            if self._progress is not None and self._progress.is_over:
                await self._finish(homes.active, self._progress)
        elif self._now() - self._tidied_at >= IDLE_S:
            self._tidied_at = self._now()
            await self._move_tombstones(homes)
            await self._stop_listing(homes)

    async def _finish(self, move: Migration, progress: MigrationProgress) -> None:
        over = replace(move, done=True, paused=False)

        def how(state: MigrationState) -> MigrationState:
            return replace(state, moves=tuple(over if one == move else one for one in state.moves))

        if await self.change(how):
            self.report(over.state, over, f"{progress.there} devices are on {over.heads_for}")

    async def _move_tombstones(self, homes: BackendAssignment) -> None:
        """Give devices that left during a migration that is over the home of the others, so that the earlier
        scheduler is no longer needed. No agent runs at the new epoch.

        A start that was requested before a departure may still be on its way, and must not find a higher
        epoch than its own (S2): a record is left alone until it has not changed for REST_S."""
        now, before, records = self._now(), self._tombstones, self._fleet.records
        self._tombstones = {}
        for move in homes.moves:
            due = []
            for one in migration.tombs(move, homes, records):
                index, since = before.get(one.slug, (one.index, now))
                since = since if index == one.index else now
                self._tombstones[one.slug] = (one.index, since)
                if now - since >= REST_S:
                    due.append(presence.advance(one, Epoch(one.epoch + 1), move.heads_for))
            for first in range(0, len(due), _TOMBSTONE_BATCH):
                stored = await self._fleet.records.commit(due[first : first + _TOMBSTONE_BATCH])
                self._fleet.records.learn([record for record in stored if record is not None])

    async def _stop_listing(self, homes: BackendAssignment) -> None:
        """Record that schedulers need not be listed any more, once that has been so for EMPTY_S."""
        fleet = self._fleet
        needed = migration.needed(homes, fleet.records, fleet.placements)
        if not self.state.backends - needed:
            self._done_since = None
            return
        if self._done_since is None:
            self._done_since = self._now()
        if self._now() - self._done_since < EMPTY_S:
            return
        before = self.state
        await self.change(
            lambda state: replace(state, backends=needed) if state == before else state
        )

    # -- what users see --------------------------------------------------------------------------

    def report(self, what: str, move: Migration, more: str) -> None:
        """Publish an event about a migration, and log it."""
        text = f"from {move.source} to {move.goal}" + (f": {more}" if more else "")
        log.warning("migration", extra={"state": what, "reason": text})
        fleet = self._fleet
        fleet.events.note_fleet(f"migration.{what}", text, {"migration": move.id})

    def hint(self) -> str:
        """What the operator should do now that all devices have moved; "" = nothing."""
        if self._scheduler is None or not self.state.base:
            return ""
        return settings_hint(self.state, self._scheduler.name)

    def status(self) -> dict[str, object]:
        """For the status: the migration in progress, or what is left to do after it, and why the document
        can't be read."""
        move = self.homes().active
        fields: dict[str, object] = {"problem": self.problem} if self.problem else {}
        if move is not None:
            there, on_way, waiting = self._counts()
            fields |= {"state": move.state, "from": move.source, "to": move.goal}
            fields |= {"there": there, "on_way": on_way, "waiting": waiting}
        elif hint := self.hint():
            fields["hint"] = hint
        return {"migration": fields} if fields else {}
