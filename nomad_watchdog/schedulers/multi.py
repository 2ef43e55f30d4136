"""One fleet on more than one scheduler: all of them behind the interface of one.

A snapshot is made of every scheduler's own, and is none when one of them is missing (S7): an agent on a
scheduler that is not heard would be taken for gone. An agent is started where its record says, and stopped
where it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from nomad_watchdog.errors import StaleError, TransientError, UserError, WatchdogError
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement
from nomad_watchdog.schedulers import (
    Capabilities,
    Capacity,
    Hint,
    Scheduler,
    Snapshot,
    by_device,
    unchanged_since,
)

log = logging.getLogger(__name__)

_MAX_HINTS: Final = 256
"""Hints that wait to be read; further ones wait at their scheduler."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    """An answer to `ensure`. The indexes of two schedulers can't be compared, so answers are numbered."""

    number: int
    backend: str
    index: int


def _as_it_is(_backend: str, spec: AgentSpec) -> AgentSpec:
    return spec


def _check_all(refused: Mapping[str, str] | None) -> None:
    if refused:
        raise UserError("; ".join(refused.values()))


class MultiScheduler:
    """`usual`: the configured backend, `make`: constructs one by name and raises UserError when it can't,
    `adapt`: what a spec is on one of them."""

    def __init__(
        self,
        usual: str,
        make: Callable[[str], Scheduler],
        adapt: Callable[[str, AgentSpec], AgentSpec] = _as_it_is,
    ) -> None:
        self.name = usual
        self.base = usual
        """Where a record without a home is placed."""
        self._make = make
        self._adapt_anew = adapt
        self._adapted_last: dict[tuple[str, str], tuple[AgentSpec, AgentSpec]] = {}
        self._parts: dict[str, Scheduler] = {usual: make(usual)}
        self._required = frozenset({usual})
        self._specs: list[AgentSpec] | None = None
        self._shards: Collection[Shard] | None = None
        """As in the last call of `prepare`."""
        self._opening = asyncio.Lock()
        self._more = asyncio.Event()
        self._tickets: dict[Slug, _Ticket] = {}
        self._last = 0
        self._read: tuple[Snapshot, Mapping[str, Snapshot]] | None = None
        """The last full snapshot, and those of the parts that it was made of."""
        self.capabilities = self._shared()

    def adapt_by(self, adapt: Callable[[str, AgentSpec], AgentSpec]) -> None:
        """What a spec is on one of them, from now on."""
        self._adapt_anew = adapt
        self._adapted_last.clear()

    @property
    def parts(self) -> Mapping[str, Scheduler]:
        """Those that are looked at now, by name."""
        return self._parts

    @property
    def lacks(self) -> frozenset[str]:
        """Those that are required and could not be opened yet."""
        return self._required - self._parts.keys()

    def require(self, names: Iterable[str]) -> bool:
        """Look at these too from now on, and take no snapshot without them; whether there are new ones. None
        is closed before the end: it may still have agents that nobody has seen end."""
        before = self._required
        self._required |= frozenset(names)
        return self._required != before

    async def open(self, name: str) -> Scheduler:
        """The backend of this name, prepared, and looked at from now on.

        Raises as `Scheduler.prepare`, and UserError when it can't be made or when an agent class can't be
        prepared on it; then nothing has changed."""
        return await self._open(name, whole=True)

    async def _open(self, name: str, *, whole: bool) -> Scheduler:
        async with self._opening:
            if name not in self._parts:
                part = self._make(name)
                try:
                    if self._specs is not None:
                        adapted = self._adapted(name, self._specs)
                        refused = await part.prepare(adapted, shards=self._shards)
                        _check_all(refused if whole else {})
                except BaseException:
                    await part.close()
                    raise
                self._parts = {**self._parts, name: part}
                self.capabilities = self._shared()
                self._more.set()
                log.info("scheduler opened", extra={"backend": name})
            return self._parts[name]

    async def try_out(self, name: str) -> Snapshot:
        """A snapshot of a backend that need not be open, which nothing is changed on.

        Raises as `Scheduler.snapshot`, and UserError when it can't be made."""
        if name in self._parts:
            return await self._parts[name].snapshot()
        part = self._make(name)
        try:
            return await part.snapshot()
        finally:
            await part.close()

    async def prepare(
        self, specs: Collection[AgentSpec], *, shards: Collection[Shard] | None = None
    ) -> Mapping[str, str]:
        self._specs, self._shards = list(specs), shards
        await self._open_all()
        refused: dict[str, str] = {}
        for name, part in self._parts.items():
            answer = await part.prepare(self._adapted(name, specs), shards=shards)
            for agent_class, why in (answer or {}).items():
                place = f"on {name}: " if len(self._parts) > 1 else ""
                refused.setdefault(agent_class, f"{place}{why}")
        return refused

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        home = record.home or self.base
        if home not in self._parts:
            raise TransientError(f"the agent belongs on {home}, which is not open here")
        index = await self._parts[home].ensure(record, epoch, self._adapt(home, spec))
        self._last += 1
        self._tickets[record.slug] = _Ticket(self._last, home, index)
        return self._last

    async def retire(self, placement: Placement, grace_s: float) -> None:
        await self._of(placement).retire(placement, grace_s)

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        await self._open_all()
        parts = self._parts
        # Before any is asked: what is answered later is not in them.
        last = self._last
        snapshots = dict(
            zip(
                parts,
                await asyncio.gather(*(part.snapshot(only) for part in parts.values())),
                strict=True,
            )
        )
        if self._parts is not parts or self.lacks:
            raise StaleError("another scheduler has come meanwhile")
        found = snapshots[self.name].placements if len(parts) == 1 else self._merged(snapshots)
        asked = None if only is None else frozenset(only)
        closed = {k: v for one in snapshots.values() for k, v in one.closed_hosts.items()}
        made = Snapshot(found, last, asked, self._behind(snapshots, last, asked), closed)
        if only is None:
            self._read = made, snapshots
        return made

    async def unchanged_since(self, snapshot: Snapshot) -> bool:
        parts, lacks = self._parts, self.lacks
        if self._read is None or self._read[0] is not snapshot or snapshot.behind or lacks:
            return False
        read = self._read[1]
        if parts.keys() != read.keys():
            return False
        answers = await asyncio.gather(
            *(unchanged_since(part, read[name]) for name, part in parts.items())
        )
        return all(answers) and self._parts is parts and not self.lacks

    def _merged(self, snapshots: Mapping[str, Snapshot]) -> dict[Slug, tuple[Placement, ...]]:
        return by_device(
            one if name == self.name else replace(one, backend=name)
            for name, snapshot in snapshots.items()
            for some in snapshot.placements.values()
            for one in some
        )

    def _behind(
        self, snapshots: Mapping[str, Snapshot], last: int, only: frozenset[Slug] | None
    ) -> frozenset[Slug]:
        """Devices whose last answer is not in these snapshots; the others' are forgotten."""
        behind = set()
        for slug in list(self._tickets) if only is None else only & self._tickets.keys():
            ticket = self._tickets[slug]
            if ticket.index > snapshots[ticket.backend].index:
                behind.add(slug)
            elif ticket.number <= last:
                del self._tickets[slug]
        return frozenset(behind)

    async def watch(self) -> AsyncIterator[Hint]:
        hints: asyncio.Queue[Hint] = asyncio.Queue(_MAX_HINTS)
        ears: dict[str, asyncio.Task[None]] = {}

        async def hear(part: Scheduler) -> None:
            async for hint in part.watch():
                await hints.put(hint)

        async def follow(group: asyncio.TaskGroup) -> None:
            while True:
                self._more.clear()
                for name in self._parts.keys() - ears.keys():
                    ears[name] = group.create_task(hear(self._parts[name]))
                await self._more.wait()

        async def listen() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(follow(group))

        # A generator can't keep a task group over its yields: it may be closed by another task.
        listening = asyncio.ensure_future(listen())
        try:
            while True:
                while not hints.empty():  # in a storm there is always one: no task for each
                    yield hints.get_nowait()
                next_one = asyncio.ensure_future(hints.get())
                try:
                    await asyncio.wait({next_one, listening}, return_when=asyncio.FIRST_COMPLETED)
                    if not next_one.done():
                        await listening  # it never ends but by an error, which is told
                    hint = next_one.result()
                finally:
                    next_one.cancel()
                yield hint
        finally:
            listening.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await listening

    async def capacity(self) -> Capacity:
        parts = self._parts
        answers = dict(
            zip(
                parts,
                await asyncio.gather(*(one.capacity() for one in parts.values())),
                strict=True,
            )
        )
        full = {name: one.reason for name, one in answers.items() if not one.room}
        if len(full) < len(parts):
            return Capacity(room=True, full=full)
        return Capacity(room=False, reason="; ".join(full.values()), full=full)

    async def sweep(self, dead: Collection[Placement]) -> int:
        by_part: dict[str, list[Placement]] = defaultdict(list)
        for placement in dead:
            by_part[placement.backend or self.name].append(placement)
        return sum(
            [
                await self._parts[name].sweep(some)
                for name, some in by_part.items()
                if name in self._parts
            ]
        )

    async def close(self) -> None:
        for part in self._parts.values():
            await part.close()

    def _of(self, placement: Placement) -> Scheduler:
        return self._parts[placement.backend or self.name]

    def _adapt(self, name: str, spec: AgentSpec) -> AgentSpec:
        # Asked for at each start, and nearly always of the same spec.
        last = self._adapted_last.get((name, spec.agent_class))
        if last is None or last[0] is not spec:
            last = spec, self._adapt_anew(name, spec)
            self._adapted_last[name, spec.agent_class] = last
        return last[1]

    def _adapted(self, name: str, specs: Iterable[AgentSpec]) -> list[AgentSpec]:
        return [self._adapt(name, spec) for spec in specs]

    async def _open_all(self) -> None:
        for name in sorted(self.lacks):
            try:
                await self._open(name, whole=False)
            except WatchdogError as error:
                raise TransientError(
                    f"{name}, where a part of the fleet lives, can't be opened: {error}"
                ) from error

    def _shared(self) -> Capabilities:
        """What all of them can."""
        each = [part.capabilities for part in self._parts.values()]
        return Capabilities(
            replaces_in_place=all(one.replaces_in_place for one in each),
            restarts=all(one.restarts for one in each),
        )
