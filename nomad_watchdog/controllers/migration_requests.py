"""What users can request of migrations: show, preview, begin, pause, resume and undo them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Final

from nomad_watchdog.controllers.migration import MigrationController
from nomad_watchdog.controllers.migration_state import MigrationState, migration_json
from nomad_watchdog.core import migration
from nomad_watchdog.core.migration import BackendAssignment, Migration
from nomad_watchdog.errors import NotFoundError, PreconditionError, UserError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.model import DeviceRecord, Presence

MAX_MIGRATIONS: Final = 16
"""Maximum number of migrations that are stored; one of the whole fleet replaces all earlier ones."""
_EVENTS: Final = {"pause": "paused", "resume": "resumed", "undo": "undoing"}


class MigrationRequests:
    """The requests to one `MigrationController`."""

    def __init__(self, fleet: Fleet, controller: MigrationController) -> None:
        self._fleet = fleet
        self._controller = controller

    async def preview(self, move: Migration) -> dict[str, object]:
        """What a migration would do, after both schedulers were tried; nothing is changed.

        Raises UserError when it makes no sense, and what a scheduler raises that can't be listed."""
        controller = self._controller
        scheduler = controller.scheduler()
        await controller.refresh()
        for name in (move.source, move.goal):
            await scheduler.try_out(name)
        homes = controller.homes_with(migration.begin(controller.state.moves, move))
        now = controller.progress(move, homes)
        if not now.covered:
            raise UserError(
                f"no device of this migration lives on {move.source} or {move.goal}; "
                f"`nomad-watchdog status` shows where they are"
            )
        moving = [r for r in self._present() if homes.goal(r) != homes.of(r)]
        shards = Counter(int(controller.ownership.shard(record.slug)) for record in moving)
        return {
            **migration_json(move),
            "devices": now.covered,
            "there": now.there,
            "to_move": len(moving),
            "by_class": dict(sorted(Counter(r.device.agent_class for r in moving).items())),
            "by_shard": {str(shard): count for shard, count in sorted(shards.items())},
        }

    async def begin(self, move: Migration) -> dict[str, object]:
        """Start a migration; durable when it returns. Raises as `preview`, UserError when a class can't run on
        the new scheduler, and ConflictError while another migration is in progress."""
        controller = self._controller
        usual = controller.scheduler().name
        preview = await self.preview(move)
        for name in (move.source, move.goal):
            await controller.open_scheduler(name)

        def how(state: MigrationState) -> MigrationState:
            moves = migration.begin(state.moves, move)
            if len(moves) > MAX_MIGRATIONS:
                raise UserError(
                    f"at most {MAX_MIGRATIONS} migrations are stored; migrate the whole fleet to remove them"
                )
            first = state.base or usual
            backends = state.backends if state.base else frozenset({first})
            return MigrationState(first, backends | {move.source, move.goal}, moves)

        await controller.change(how)
        controller.report("started", move, f"{preview['to_move']} devices to move")
        return preview

    async def control(self, what: str) -> dict[str, object]:
        """`pause`, `resume` or `undo` the migration in progress; `undo` also the last one that is over.

        Raises NotFoundError when there is none, PreconditionError when its state does not allow it."""
        controller = self._controller
        controller.scheduler()
        await controller.refresh()
        if what == "undo" and controller.state.moves:
            await controller.open_scheduler(_latest(controller.state.moves).source)
        changed: list[Migration] = []

        def how(state: MigrationState) -> MigrationState:
            old = _latest(state.moves) if state.moves else None
            if old is None or (old.done and what != "undo"):
                raise NotFoundError("no migration is in progress")
            new = _controlled(old, what)
            changed[:] = [new]
            moves = tuple(new if one is old else one for one in state.moves)
            return replace(state, moves=moves, backends=state.backends | {new.source, new.goal})

        stored = await controller.change(how)
        (move,) = changed
        if stored:
            controller.report(_EVENTS[what], move, "")
        return migration_json(move)

    async def view(self) -> dict[str, object]:
        """All migrations that are stored, and how far they have come. Raises as `MigrationController.refresh`."""
        controller = self._controller
        await controller.refresh()
        homes = controller.homes()
        lives = Counter(filter(None, map(homes.of, self._present())))
        return {
            "items": [self._item(move, homes) for move in homes.moves],
            "lives": dict(sorted(lives.items())),
            "looks_at": sorted(controller.scheduler().parts) if controller.on else [],
            "hint": controller.hint(),
            "problem": controller.problem,
        }

    def _item(self, move: Migration, homes: BackendAssignment) -> dict[str, object]:
        now = self._controller.progress(move, homes)
        return migration_json(move) | {
            "devices": now.covered,
            "there": now.there,
            "ready": now.there - now.on_way,
            "waiting": now.covered - now.there,
            "ending": now.leftover,
        }

    def _present(self) -> list[DeviceRecord]:
        return [r for r in self._fleet.records.values() if r.presence is Presence.PRESENT]


def _latest(moves: tuple[Migration, ...]) -> Migration:
    """The migration in progress, or the last one that is over."""
    return next((one for one in moves if not one.done), moves[-1])


def _controlled(move: Migration, what: str) -> Migration:
    if what == "undo":
        if move.back:
            raise PreconditionError(f"the migration to {move.goal} is already {move.state}")
        return replace(move, back=True, paused=False, done=False)
    if what == "pause":
        return replace(move, paused=True)
    if not move.paused:
        raise PreconditionError(f"the migration to {move.goal} is not paused, it is {move.state}")
    return replace(move, paused=False)
