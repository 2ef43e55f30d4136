"""The pauses and maintenance windows, stored as one document in the registry.

A pause that has ended stays in the document until the next change removes it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from pydantic import BaseModel, Field

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import pauses as rules
from nomad_watchdog.core.pauses import Pause, Target
from nomad_watchdog.errors import DamagedError, UserError
from nomad_watchdog.model import WallTime
from nomad_watchdog.registry import Registry
from nomad_watchdog.registry.document import Document, DocumentFormat, OtherVersionError
from nomad_watchdog.signals import Signal

log = logging.getLogger(__name__)

MAX_PAUSES: Final = 256
"""Maximum number of pauses and maintenance windows."""
_NEVER: Final = (float("inf"), float("inf"))


class TargetFields(BaseModel):
    """A target as JSON."""

    devices: frozenset[str]
    agent_class: str = Field(alias="class")
    labels: dict[str, str]

    def target(self) -> Target:
        return Target(self.devices, self.agent_class, self.labels)


class _PauseFields(TargetFields):
    id: str
    begins: WallTime
    ends: WallTime | None
    reason: str
    by: str
    window: bool

    def pause(self) -> Pause:
        ends, window = self.ends, self.window
        return Pause(self.id, self.target(), self.begins, ends, self.reason, self.by, window)


class _DocumentFields(BaseModel):
    pauses: list[_PauseFields]


def _serialized(pauses: Sequence[Pause]) -> dict[str, object]:
    items = [
        {
            "id": p.id,
            **p.target.shown(),
            "begins": p.begins,
            "ends": p.ends,
            "reason": p.reason,
            "by": p.by,
            "window": p.window,
        }
        for p in pauses
    ]
    return {"pauses": items}


FORMAT: Final[DocumentFormat[tuple[Pause, ...]]] = DocumentFormat(
    name="pauses",
    empty=(),
    parse=lambda fields: tuple(p.pause() for p in _DocumentFields.model_validate(fields).pauses),
    serialize=_serialized,
    repair="put back what nomad-watchdog wrote, or delete it",
)


class Pauses:
    """The devices for which all actions are paused."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self.clock = clock
        self.problem = ""
        """Why the stored document can't be used; the pauses that were last read stay in force."""
        self.went_back: Signal[[]] = Signal()
        """The stored document is older than the one read before: the registry went back in time."""
        self._document = Document(registry, FORMAT)
        self._reported: tuple[Pause, ...] = ()
        self._in_force: tuple[Pause, ...] = ()
        self._in_force_of: tuple[Pause, ...] = ()
        """The pauses that `_in_force` was computed from."""
        self._steady: tuple[float, float] = _NEVER
        """From when until when the same pauses are in force."""

    @property
    def all(self) -> tuple[Pause, ...]:
        """In the order of their creation, including those that have ended."""
        return self._document.value

    @property
    def now(self) -> WallTime:
        """By the wall clock."""
        return self.clock.wall()

    def in_force(self) -> tuple[Pause, ...]:
        """The pauses that are active now."""
        if not self.all:
            return ()
        now = self.now
        since, until = self._steady
        # The clock may have been set back, too.
        if self._in_force_of is not self.all or not since <= now < until:
            self._in_force, self._in_force_of = rules.active(self.all, now), self.all
            self._steady = (now, rules.next_change(self.all, now))
        return self._in_force

    async def refresh(self) -> bool:
        """Read the document; whether other pauses are in force than at the last call.

        Raises what the registry raises."""
        known = self._document.index
        try:
            await self._document.refresh()
            self.problem = ""
        except (DamagedError, OtherVersionError) as error:
            if str(error) != self.problem:
                log.warning("pauses can't be read", extra={"reason": str(error)})
            self.problem = str(error)
        if self._document.index < known:
            self.went_back.emit()
        found = self.in_force()
        changed, self._reported = found != self._reported, found
        return changed

    async def change(self, change: Callable[[tuple[Pause, ...]], tuple[Pause, ...]]) -> bool:
        """Apply `change` to the stored pauses; whether it changed them. Durable when it returns.

        Raises UserError when there would be too many, and as `Document.update`."""

        def checked(before: tuple[Pause, ...]) -> tuple[Pause, ...]:
            after = change(before)
            if len(after) > MAX_PAUSES:
                raise UserError(f"{len(after)} pauses; at most {MAX_PAUSES} are allowed at once")
            return after

        return await self._document.update(checked)

    async def add(self, pause: Pause) -> Pause:
        """Store a pause; one with the same target replaces the old one and keeps its id."""
        stored = pause

        def change(before: tuple[Pause, ...]) -> tuple[Pause, ...]:
            nonlocal stored
            after = rules.add(before, pause, self.now)
            gone = [old for old in before if old not in after and not old.is_over(self.now)]
            stored = replace(pause, id=gone[0].id) if gone else pause
            return (*after[:-1], stored)

        await self.change(change)
        return stored

    async def resume(self, target: Target) -> bool:
        """End the pauses of exactly this target; whether there were any."""
        return await self.change(lambda before: rules.resume(before, target, self.now))

    async def remove(self, pause_id: str) -> bool:
        """End the pause or maintenance window with this id; whether there was one."""

        def change(before: tuple[Pause, ...]) -> tuple[Pause, ...]:
            if all(p.id != pause_id or p.is_over(self.now) for p in before):
                return before
            return rules.remove(before, pause_id, self.now)

        return await self.change(change)


def new_id() -> str:
    """Twelve hexadecimal digits."""
    return secrets.token_hex(6)
