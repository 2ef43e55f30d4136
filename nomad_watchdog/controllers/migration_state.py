"""The migrations of a fleet as the registry stores them: one document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, Field

from nomad_watchdog.core.migration import Migration
from nomad_watchdog.core.pauses import Target
from nomad_watchdog.fleet.pauses import TargetFields
from nomad_watchdog.model import WallTime
from nomad_watchdog.registry.document import DocumentFormat


@dataclass(frozen=True, slots=True)
class MigrationState:
    """What the registry stores."""

    base: str = ""
    """Where a record without a home is placed: the backend before the first migration; "" = there was none."""
    backends: frozenset[str] = frozenset()
    """Schedulers that have agents or may get some: every replica must list them all."""
    moves: tuple[Migration, ...] = ()


def settings_hint(state: MigrationState, usual: str) -> str:
    """How to change the setting `backend` after a migration that is over; "" = leave it."""
    last = next((m for m in reversed(state.moves) if m.done and m.is_whole), None)
    if last is None or any(not m.done for m in state.moves) or usual == last.heads_for:
        return ""
    return (
        f"the fleet lives on {last.heads_for} and `backend` is still {usual}: set backend = "
        f'"{last.heads_for}" and restart'
    )


def migration_json(move: Migration) -> dict[str, object]:
    """A migration in the API."""
    return {
        "id": move.id,
        "from": move.source,
        "to": move.goal,
        "state": move.state,
        "all": move.is_whole,
        "target": (move.target or Target()).shown(),
        "shards": sorted(move.shards),
        "at_once": move.at_once,
        "back": move.back,
        "began": move.began,
        "by": move.by,
    }


class _MoveFields(BaseModel):
    id: str
    source: str = Field(alias="from")
    goal: str = Field(alias="to")
    began: WallTime
    by: str
    target: TargetFields
    shards: frozenset[int]
    of_shards: int
    at_once: int
    back: bool
    paused: bool
    done: bool

    def move(self) -> Migration:
        target = self.target.target()
        return Migration(
            id=self.id,
            source=self.source,
            goal=self.goal,
            began=self.began,
            by=self.by,
            target=None if target == Target() else target,
            shards=self.shards,
            of_shards=self.of_shards,
            at_once=self.at_once,
            back=self.back,
            paused=self.paused and not self.done,  # one that has ended is not paused
            done=self.done,
        )


class _StateFields(BaseModel):
    base: str
    backends: frozenset[str]
    moves: list[_MoveFields]


def _parsed(fields: object) -> MigrationState:
    found = _StateFields.model_validate(fields)
    return MigrationState(found.base, found.backends, tuple(one.move() for one in found.moves))


def _serialized(state: MigrationState) -> dict[str, object]:
    moves = [
        migration_json(move)
        | {"of_shards": move.of_shards, "paused": move.paused, "done": move.done}
        for move in state.moves
    ]
    return {"base": state.base, "backends": sorted(state.backends), "moves": moves}


FORMAT: Final[DocumentFormat[MigrationState]] = DocumentFormat(
    name="migration",
    empty=MigrationState(),
    parse=_parsed,
    serialize=_serialized,
    repair="put back what nomad-watchdog wrote",
)
