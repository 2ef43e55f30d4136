"""The pauses as the registry has them: one small document, changed by compare-and-set.

Nothing removes a pause that is over at its time; it just counts no more, and the next change drops it.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import pauses as rules
from nomad_watchdog.core.pauses import Pause, Target
from nomad_watchdog.errors import ConflictError, UserError
from nomad_watchdog.model import WallTime
from nomad_watchdog.registry import Registry, RegistryDocument, read_document

log = logging.getLogger(__name__)

NAME: Final = "pauses"
VERSION: Final = 1
TRIES: Final = 5
_NEVER: Final = (float("inf"), float("inf"))
MOST: Final = 256
"""Pauses and windows at once; more are a selector that was not found."""


class Pauses:
    """Which devices nothing is done for, and who said so."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self.registry = registry
        self.clock = clock
        self.all: tuple[Pause, ...] = ()
        """In the order of their making, those that are over included."""
        self.problem = ""
        """Why the stored document can't be used; the last good one stands."""
        self.on_older: Callable[[], None] = lambda: None
        """Called when the stored document is older than one that was known: the registry went back in time."""
        self._index = -1
        self._said: tuple[Pause, ...] = ()
        self._in_force: tuple[Pause, ...] = ()
        self._steady: tuple[float, float] = _NEVER
        """From when until when the same ones are in force."""

    @property
    def now(self) -> WallTime:
        """By the wall clock."""
        return self.clock.wall()

    def in_force(self) -> tuple[Pause, ...]:
        """Those that are active now."""
        if not self.all:
            return ()
        now = self.now
        since, until = self._steady
        if not since <= now < until:  # a clock that was set back too
            self._in_force = rules.active(self.all, now)
            self._steady = (now, rules.next_change(self.all, now))
        return self._in_force

    async def refresh(self) -> bool:
        """Read the document; whether other pauses are in force than the last time that this was asked.

        Raises what the registry raises."""
        known = self._index
        document = await self.registry.document(NAME)
        self._take(document)
        if document.index < known:
            self.on_older()
        found = self.in_force()
        changed, self._said = found != self._said, found
        return changed

    def _take(self, document: RegistryDocument) -> None:
        if document.index == self._index:
            return
        self._index = document.index
        try:
            self.all, self.problem = decode(document.body), ""
            self._steady = _NEVER
        except UserError as error:
            self.problem = str(error)
            log.warning("pauses can't be read", extra={"reason": self.problem})

    async def change(self, how: Callable[[tuple[Pause, ...]], tuple[Pause, ...]]) -> bool:
        """Store what `how` makes of the pauses; whether that was a change. Durable when it returns.

        Raises UserError when there would be too many, ConflictError when other writers won TRIES times."""
        for _ in range(TRIES):
            found = await self.registry.document(NAME)
            before = decode(found.body)
            after = how(before)
            if after == before:
                self._take(found)
                return False
            if len(after) > MOST:
                raise UserError(f"{len(after)} pauses; at most {MOST} are allowed at once")
            stored = await self.registry.commit_document(NAME, replace(found, body=encode(after)))
            if stored is not None:
                self._take(stored)
                return True
        raise ConflictError("the pauses are being changed by others; try again")

    async def add(self, pause: Pause) -> Pause:
        """Store a pause; one of the same target takes the place of the old one and its id."""
        kept = pause

        def how(before: tuple[Pause, ...]) -> tuple[Pause, ...]:
            nonlocal kept
            after = rules.add(before, pause, self.now)
            gone = [old for old in before if old not in after and not old.is_over(self.now)]
            kept = replace(pause, id=gone[0].id) if gone else pause
            return (*after[:-1], kept)

        await self.change(how)
        return kept

    async def resume(self, target: Target) -> bool:
        """End the pauses of exactly this target; whether there were any."""
        return await self.change(lambda before: rules.resume(before, target, self.now))

    async def remove(self, pause_id: str) -> bool:
        """End the pause or window of this id; whether there was one."""
        found = await self.registry.document(NAME)
        if all(p.id != pause_id or p.is_over(self.now) for p in decode(found.body)):
            return False
        return await self.change(lambda before: rules.remove(before, pause_id, self.now))


def new_id() -> str:
    """Twelve hexadecimal digits."""
    return secrets.token_hex(6)


def encode(pauses: Iterable[Pause]) -> bytes:
    """As the registry keeps them."""
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
    return json.dumps({"v": VERSION, "pauses": items}, separators=(",", ":")).encode()


def decode(body: bytes) -> tuple[Pause, ...]:
    """The pauses in a document; none in an empty one.

    Raises UserError when it is not what `encode` writes."""
    mend = "put back what nomad-watchdog wrote, or delete it"
    return read_document(NAME, body, VERSION, _pauses, mend) if body else ()


def _pauses(said: Any) -> tuple[Pause, ...]:
    return tuple(map(_pause, said["pauses"]))


def _pause(item: Mapping[str, Any]) -> Pause:
    ends = item["ends"]
    return Pause(
        id=str(item["id"]),
        target=Target.read(item),
        begins=WallTime(float(item["begins"])),
        ends=None if ends is None else WallTime(float(ends)),
        reason=str(item["reason"]),
        by=str(item["by"]),
        window=item["window"] is True,
    )
