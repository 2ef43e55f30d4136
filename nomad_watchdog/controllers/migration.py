"""A fleet on its way from one scheduler to another: what was asked for, as the registry has it.

One small document, changed by compare-and-set, read by every replica before it decides anything. Who moves
when is decided by `core.migration`; the holder of shard 0 says when a move is over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Final

from nomad_watchdog.controllers.migration_state import FORMAT, MigrationState, hint, shown
from nomad_watchdog.core import migration, presence
from nomad_watchdog.core.migration import BackendAssignment, Migration, MigrationProgress
from nomad_watchdog.core.placement_gc import REST_S
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.errors import (
    NotFoundError,
    PreconditionError,
    UserError,
    WatchdogError,
)
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import DeviceRecord, Epoch, Monotonic, Presence, WallTime
from nomad_watchdog.registry.document import Document
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import Scheduler
from nomad_watchdog.schedulers.multi import MultiScheduler

log = logging.getLogger(__name__)

MOST: Final = 16
"""Moves that are kept; one of the whole fleet takes the place of all."""
FRESH_S: Final = 5.0
"""What is asked for is read every second. Who could not read it for so long decides nothing, and nothing
moves for so long after a change: so nobody decides who does not know of both schedulers."""
EMPTY_S: Final = 90.0
"""A scheduler is looked at for so long after the last agent there has ended: longer than any request or
action that is older travels (`graveyard.REST_S`)."""
IDLE_S: Final = 10.0
"""So often, with no move under way, all records are gone through for what is left of those that are over."""
_TOMBS: Final = 64


class MigrationController:
    """The moves of one fleet. `scheduler` must be a `MultiScheduler` for any to be possible; `grown` is called when
    more schedulers must be looked at than before."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        ownership: ShardOwnership,
        metrics: Metrics,
        grown: Callable[[], None],
    ) -> None:
        self._fleet = fleet
        self._moving = scheduler if isinstance(scheduler, MultiScheduler) else None
        self._territory = ownership
        self._metrics = metrics
        self._grown = grown
        self._document = Document(fleet.registry, FORMAT)
        self._read_at = Monotonic(float("-inf"))
        self._changed_at = Monotonic(float("-inf"))
        self._unburied: dict[Slug, tuple[int, Monotonic]] = {}
        """Index of a record that is to be buried, and since when it is known to have that."""
        self._done_since: Monotonic | None = None
        self._tidied_at = Monotonic(float("-inf"))
        self._progress: MigrationProgress | None = None
        self._seen: set[str] = set()
        self.problem = ""
        """Why the document can't be read now; what was read before stands."""
        if self.on:
            fleet.views.add_status(self.status)

    @property
    def _kept(self) -> MigrationState:
        return self._document.value

    @property
    def on(self) -> bool:
        """Whether this fleet can have more than one scheduler."""
        return self._moving is not None

    def homes(self) -> BackendAssignment | None:
        """Where agents live and should live; None while the fleet was never moved."""
        if self._moving is None or not self._kept.base:
            return None
        kept, moving = self._kept, self._moving
        return BackendAssignment(moving.name, kept.base, kept.moves, frozenset(moving.parts))

    def unsure(self, records: Mapping[Slug, DeviceRecord]) -> frozenset[Slug]:
        """Devices for which nothing may be decided, as we may not know of the scheduler that has their agent."""
        if self._moving is None:
            return frozenset()
        if self._is_blind:
            return frozenset(records)
        homes = self.homes()
        known = {""} if homes is None else homes.is_open | {""}
        if homes is not None and homes.base not in known:
            return frozenset(homes.strangers(records))
        if self._seen <= known:
            return frozenset()
        return frozenset(slug for slug, record in records.items() if record.home not in known)

    @property
    def _is_blind(self) -> bool:
        return self._now() - self._read_at > FRESH_S

    def blind(self) -> str:
        """Why nothing is decided for any device now, in words; "" = that is not so."""
        if self._moving is None or not self._is_blind:
            return ""
        why = self.problem or "no answer yet"
        return f"nothing is decided: the registry does not say what migrations there are: {why}"

    def seen(self, records: Iterable[DeviceRecord]) -> None:
        """Note where records say that they live."""
        self._seen |= {record.home for record in records}

    def _now(self) -> Monotonic:
        return self._fleet.clock.monotonic()

    def with_moves(
        self,
        readiness: Readiness,
        homes: BackendAssignment | None,
        resting: AbstractSet[Slug],
        classes: Container[str],
    ) -> Readiness:
        """The readiness with what a roll-out must know of the move that is under way. `classes`: those that
        are configured."""
        move = homes.active if homes is not None else None
        if homes is None or move is None or move.paused:
            return readiness
        if self._now() - self._changed_at <= FRESH_S:
            return replace(readiness, turn=lambda _slug: False)
        fleet, ownership = self._fleet, self._territory

        def can(record: DeviceRecord) -> bool:
            kind = record.device.agent_class
            return record.slug not in resting and kind in classes and kind not in readiness.halted

        turn = migration.frontier(homes, fleet.records, fleet.placements, can, ownership.shard)
        return replace(
            readiness,
            turn=lambda slug: turn is not None and ownership.shard(slug) <= turn,
            moving=self._measure(move, homes).on_way,
            moves_at_once=move.at_once,
        )

    def _measure(self, move: Migration, homes: BackendAssignment) -> MigrationProgress:
        fleet = self._fleet
        return migration.progress(
            move, homes, fleet.records, fleet.placements, fleet.verdicts.has_ready_agent
        )

    # -- what the registry keeps ----------------------------------------------------------------

    async def refresh(self) -> bool:
        """Read the document; whether it has changed. Raises what the registry raises, and UserError when
        it can't be understood."""
        if self._moving is None:
            return False
        began = self._now()
        changed = await self._document.refresh()
        if changed:
            self._on_changed(self._moving)
        self._read_at = Monotonic(max(self._read_at, began))
        return changed

    def _on_changed(self, moving: MultiScheduler) -> None:
        self._changed_at = self._now()
        if self._kept.base:
            moving.base = self._kept.base
        if moving.require(self._kept.backends):
            self._grown()

    async def look(self) -> bool:
        """Read the document and, as the judge, say what is over; whether something has changed."""
        try:
            changed = await self.refresh()
            homes = self.homes()
            move = homes.active if homes is not None else None
            self._progress = self._measure(move, homes) if homes and move else None
            self._metrics.migration(*self._counts())
            if homes is not None:
                await self._judge(homes)
        except WatchdogError as error:
            if not self.problem:
                log.warning("migration not read", extra={"reason": str(error)})
            self.problem = str(error)
            return False
        self.problem = ""
        return changed

    def _counts(self) -> tuple[int, int, int]:
        """Devices that are there with a ready agent, on their way, and waiting."""
        now = self._progress or MigrationProgress()
        return now.there - now.on_way, now.on_way, now.covered - now.there

    async def _judge(self, homes: BackendAssignment) -> None:
        if not self._fleet.readiness.ready or not self._territory.may_lead():
            self._done_since = None
            return
        move = homes.active
        if move is None:
            if self._now() - self._tidied_at < IDLE_S:
                return
            self._tidied_at = self._now()
            await self._bury(homes)
            await self._leave(homes)
            return
        self._done_since = None
        if self._progress is None or not self._progress.is_over:
            return
        over = replace(move, done=True, paused=False)

        def how(kept: MigrationState) -> MigrationState:
            return replace(kept, moves=tuple(over if one == move else one for one in kept.moves))

        if await self._change(how):
            self._tell(over.state, over, f"{self._progress.there} devices are on {over.heads_for}")

    async def _bury(self, homes: BackendAssignment) -> None:
        """Give those who left during a move that is over the home of the others, so that nothing holds on to
        where they were. Nobody runs at the new epoch.

        A start that was asked for before a departure may still be on its way, and must not find a higher
        epoch than its own (S2): a record is left alone until it has not changed for REST_S."""
        now, before, records = self._now(), self._unburied, self._fleet.records
        self._unburied = {}
        for move in homes.moves:
            due = []
            for one in migration.tombs(move, homes, records):
                index, since = before.get(one.slug, (one.index, now))
                since = since if index == one.index else now
                self._unburied[one.slug] = (one.index, since)
                if now - since >= REST_S:
                    due.append(presence.advance(one, Epoch(one.epoch + 1), move.heads_for))
            for first in range(0, len(due), _TOMBS):
                stored = await self._fleet.records.commit(due[first : first + _TOMBS])
                self._fleet.records.learn([record for record in stored if record is not None])

    async def _leave(self, homes: BackendAssignment) -> None:
        """Note that schedulers need not be looked at any more, once that has been so for EMPTY_S."""
        fleet = self._fleet
        needed = migration.needed(homes, fleet.records, fleet.placements)
        if not self._kept.backends - needed:
            self._done_since = None
            return
        if self._done_since is None:
            self._done_since = self._now()
        if self._now() - self._done_since < EMPTY_S:
            return
        before = self._kept
        await self._change(lambda kept: replace(kept, backends=needed) if kept == before else kept)

    async def _change(self, how: Callable[[MigrationState], MigrationState]) -> bool:
        """Store what `how` makes of the stored state; whether that was a change. Durable when it returns."""
        known = self._document.index
        try:
            return await self._document.update(how)
        finally:
            if self._document.index != known:
                self._on_changed(self._needed())

    # -- what an operator says ------------------------------------------------------------------

    async def preview(self, move: Migration) -> dict[str, object]:
        """What a move would do, after a look at both schedulers; nothing is changed.

        Raises UserError when it makes no sense, and what a scheduler raises that can't be listed."""
        moving = self._needed()
        await self.refresh()
        for name in (move.source, move.goal):
            await moving.try_out(name)
        base = self._kept.base or moving.name
        moves = migration.begin(self._kept.moves, move)
        homes = BackendAssignment(moving.name, base, moves, frozenset(moving.parts))
        records = self._fleet.records
        now = self._measure(move, homes)
        if not now.covered:
            raise UserError(
                f"no device that is meant lives on {move.source} or {move.goal}; "
                f"`nomad-watchdog status` shows where they are"
            )
        classes: dict[str, int] = {}
        shards: dict[str, int] = {}
        for slug, record in records.items():
            if record.presence is Presence.PRESENT and homes.goal(record) != homes.of(record):
                name = record.device.agent_class
                classes[name] = classes.get(name, 0) + 1
                shard = str(int(self._territory.shard(slug)))
                shards[shard] = shards.get(shard, 0) + 1
        return {
            **shown(move),
            "devices": now.covered,
            "there": now.there,
            "to_move": sum(classes.values()),
            "by_class": dict(sorted(classes.items())),
            "by_shard": dict(sorted(shards.items(), key=lambda item: int(item[0]))),
        }

    async def begin(self, move: Migration) -> dict[str, object]:
        """Start a move; durable when it returns. Raises as `preview`, UserError when a class can't run on
        the new scheduler, and ConflictError while another move is under way."""
        moving = self._needed()
        told = await self.preview(move)
        for name in (move.source, move.goal):
            await self._open(moving, name)

        def how(kept: MigrationState) -> MigrationState:
            moves = migration.begin(kept.moves, move)
            if len(moves) > MOST:
                raise UserError(f"{MOST} migrations are kept; move the whole fleet to forget them")
            first = kept.base or moving.name
            backends = kept.backends if kept.base else frozenset({first})
            return MigrationState(first, backends | {move.source, move.goal}, moves)

        await self._change(how)
        self._tell("started", move, f"{told['to_move']} devices to move")
        return told

    async def say(self, what: str) -> dict[str, object]:
        """`pause`, `resume` or `undo` the move that is under way (`undo`: the last one that is over, too).

        Raises NotFoundError when there is none, PreconditionError when it makes no sense now."""
        chosen = Migration("", "", "", WallTime(0.0), "")

        def how(kept: MigrationState) -> MigrationState:
            nonlocal chosen
            at = next((n for n, one in enumerate(kept.moves) if not one.done), None)
            if at is None and what == "undo" and kept.moves:
                at = len(kept.moves) - 1
            if at is None:
                raise NotFoundError("no migration is under way")
            chosen = _said(kept.moves[at], what)
            moves = (*kept.moves[:at], chosen, *kept.moves[at + 1 :])
            both = {chosen.source, chosen.goal}
            return replace(kept, moves=moves, backends=kept.backends | both)

        moving = self._needed()
        await self.refresh()
        if what == "undo" and self._kept.moves:
            last = next((m for m in self._kept.moves if not m.done), self._kept.moves[-1])
            await self._open(moving, last.source)
        if await self._change(how):
            past = {"pause": "paused", "resume": "resumed", "undo": "undoing"}
            self._tell(past[what], chosen, "")
        return shown(chosen)

    async def _open(self, moving: MultiScheduler, name: str) -> None:
        """As `MultiScheduler.open`; what was listed without a scheduler that is new here says nothing of its agents."""
        new = name not in moving.parts
        await moving.open(name)
        if new:
            self._grown()

    def _needed(self) -> MultiScheduler:
        if self._moving is None:
            raise UserError("this control plane knows one scheduler only")
        return self._moving

    def _tell(self, what: str, move: Migration, more: str) -> None:
        text = f"from {move.source} to {move.goal}" + (f": {more}" if more else "")
        log.warning("migration", extra={"state": what, "reason": text})
        self._fleet.events.own.add(
            at=self._fleet.clock.wall(),
            kind=f"migration.{what}",
            device_id="",
            slug=Slug(""),
            text=text,
            data={"migration": move.id},
        )

    def view(self) -> dict[str, object]:
        """All that is kept, and how far it has come."""
        homes = self.homes()
        kept = self._kept
        items = []
        for move in kept.moves if homes is not None else ():
            assert homes is not None
            now = self._measure(move, homes)
            waiting = now.covered - now.there
            items.append(
                shown(move)
                | {
                    "devices": now.covered,
                    "there": now.there,
                    "ready": now.there - now.on_way,
                    "waiting": waiting,
                    "ending": now.leftover,
                }
            )
        lives: dict[str, int] = {}
        for record in self._fleet.records.values():
            if record.presence is Presence.PRESENT and homes is not None:
                lives[homes.of(record)] = lives.get(homes.of(record), 0) + 1
        return {
            "items": items,
            "lives": dict(sorted(lives.items())),
            "looks_at": sorted(self._moving.parts) if self._moving else [],
            "hint": self.hint(),
            "problem": self.problem,
        }

    def hint(self) -> str:
        """What the operator should do now that all has moved; "" = nothing."""
        if self._moving is None or not self._kept.base:
            return ""
        return hint(self._kept, self._moving.name)

    def status(self) -> dict[str, object]:
        """For the status: the move that is under way, or what is left to do after it, and why the document
        can't be read."""
        homes = self.homes()
        move = homes.active if homes is not None else None
        told: dict[str, object] = {"problem": self.problem} if self.problem else {}
        if move is not None:
            there, on_way, waiting = self._counts()
            told |= {"state": move.state, "from": move.source, "to": move.goal}
            told |= {"there": there, "on_way": on_way, "waiting": waiting}
        elif hint := self.hint():
            told["hint"] = hint
        return {"migration": told} if told else {}


def _said(move: Migration, what: str) -> Migration:
    if what == "undo":
        if move.back:
            raise PreconditionError(f"the migration to {move.goal} is {move.state} already")
        return replace(move, back=True, paused=False, done=False)
    if what == "pause":
        return replace(move, paused=True)
    if not move.paused:
        raise PreconditionError(f"the migration to {move.goal} is not paused, it is {move.state}")
    return replace(move, paused=False)
