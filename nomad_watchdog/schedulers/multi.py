"""One fleet on several schedulers, behind the interface of one.

A snapshot combines the snapshots of all schedulers. It fails when one of them fails (S7), because the agents of that
scheduler would be missing. An agent is started on the scheduler of its record, and stopped where it runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from nomad_watchdog.errors import (
    ConflictError,
    StaleError,
    TransientError,
    UserError,
    WatchdogError,
)
from nomad_watchdog.host_pressure import HostUsage
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement, PlacementState
from nomad_watchdog.schedulers import (
    Capabilities,
    Capacity,
    Hint,
    Scheduler,
    Snapshot,
    by_device,
    host_usage,
    open_hosts,
    unchanged_since,
)

log = logging.getLogger(__name__)

_MAX_HINTS: Final = 256
"""Maximum number of unread hints. Further ones wait at their scheduler."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    """The result of an `ensure`. Indexes of different schedulers are not comparable, so results are numbered."""

    number: int
    backend: str
    index: int


def _unadapted(_backend: str, spec: AgentSpec) -> AgentSpec:
    return spec


def _check_all(refused: Mapping[str, str] | None) -> None:
    if refused:
        raise UserError("; ".join(refused.values()))


class MultiScheduler:
    """`usual`: the configured backend. `make`: constructs a backend by name; raises UserError when that fails.
    `adapt`: the form of a spec on a backend."""

    def __init__(
        self,
        usual: str,
        make: Callable[[str], Scheduler],
        adapt: Callable[[str, AgentSpec], AgentSpec] = _unadapted,
    ) -> None:
        self.name = usual
        self.base = usual
        """The backend for records without a home."""
        self._make = make
        self._adapt_spec = adapt
        self._adapted_last: dict[tuple[str, str], tuple[AgentSpec, AgentSpec]] = {}
        self._parts: dict[str, Scheduler] = {usual: make(usual)}
        self._required = frozenset({usual})
        self._specs: list[AgentSpec] | None = None
        self._trials: list[AgentSpec] = []
        self._shards: Collection[Shard] | None = None
        """Of the last call of `prepare`."""
        self._opening = asyncio.Lock()
        self._more = asyncio.Event()
        self._tickets: dict[Slug, _Ticket] = {}
        self._last = 0
        self._read: tuple[Snapshot, Mapping[str, Snapshot]] | None = None
        """The last full snapshot, and the snapshots of the parts that it combines."""
        self.capabilities = self._shared()

    def adapt_by(self, adapt: Callable[[str, AgentSpec], AgentSpec]) -> None:
        """Set the form of a spec on a backend from now on."""
        self._adapt_spec = adapt
        self._adapted_last.clear()

    @property
    def parts(self) -> Mapping[str, Scheduler]:
        """The open schedulers, by name."""
        return self._parts

    @property
    def lacks(self) -> frozenset[str]:
        """The required schedulers that could not be opened yet."""
        return self._required - self._parts.keys()

    def require(self, names: Iterable[str]) -> bool:
        """Require these schedulers for every snapshot from now on. Returns whether some of them are new. A scheduler
        stays open until the end, because it may still have agents that have not ended."""
        before = self._required
        self._required |= frozenset(names)
        return self._required != before

    async def open(self, name: str) -> Scheduler:
        """Open and prepare the backend of this name.

        Raises as `Scheduler.prepare`, and UserError when it cannot be constructed or an agent class cannot be
        prepared on it; then nothing has changed."""
        return await self._open(name, whole=True)

    async def _open(self, name: str, *, whole: bool) -> Scheduler:
        async with self._opening:
            if name not in self._parts:
                part = self._make(name)
                try:
                    if self._specs is not None:
                        refused = await self._prepare(name, part)
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
        """A snapshot of a backend, which need not be open. Nothing is changed on it.

        Raises as `Scheduler.snapshot`, and UserError when it cannot be constructed."""
        if name in self._parts:
            return await self._parts[name].snapshot()
        part = self._make(name)
        try:
            return await part.snapshot()
        finally:
            await part.close()

    async def prepare(
        self,
        specs: Collection[AgentSpec],
        *,
        shards: Collection[Shard] | None = None,
        trials: Collection[AgentSpec] = (),
    ) -> Mapping[str, str]:
        self._specs, self._shards, self._trials = list(specs), shards, list(trials)
        await self._open_all()
        refused: dict[str, str] = {}
        for name, part in self._parts.items():
            answer = await self._prepare(name, part)
            for agent_class, why in answer.items():
                place = f"on {name}: " if len(self._parts) > 1 else ""
                refused.setdefault(agent_class, f"{place}{why}")
        return refused

    async def _prepare(self, name: str, part: Scheduler) -> Mapping[str, str]:
        """Have one backend prepared for the specs of the last `prepare`."""
        specs, trials = self._adapted(name, self._specs or ()), self._adapted(name, self._trials)
        more = {"trials": trials} if trials else {}
        return await part.prepare(specs, shards=self._shards, **more) or {}

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
        # Read before the snapshots: later results of `ensure` may not be in them.
        last = self._last
        snapshots = dict(
            zip(
                parts,
                await asyncio.gather(*(part.snapshot(only) for part in parts.values())),
                strict=True,
            )
        )
        if self._parts is not parts or self.lacks:
            raise StaleError("another scheduler was added during the snapshot")
        found = snapshots[self.name].placements if len(parts) == 1 else self._merged(snapshots)
        slugs = None if only is None else frozenset(only)
        closed = {k: v for one in snapshots.values() for k, v in one.closed_hosts.items()}
        made = Snapshot(found, last, slugs, self._behind(snapshots, last, slugs), closed)
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

    async def open_hosts(self) -> frozenset[str] | None:
        """As `schedulers.open_hosts`, of the scheduler that runs the agents. Raises ConflictError while several do."""
        read = self._read[1] if self._read is not None else {}
        used = [
            name
            for name, snapshot in read.items()
            if any(
                one.state is not PlacementState.DEAD
                for some in snapshot.placements.values()
                for one in some
            )
        ]
        if len(used) > 1:
            raise ConflictError(f"agents run on several schedulers: {', '.join(sorted(used))}")
        return await open_hosts(self._parts[used[0] if used else self.name])

    async def host_usage(self, hosts: Collection[str]) -> Mapping[str, HostUsage]:
        """As `schedulers.host_usage`, of all schedulers."""
        each = [await host_usage(part, hosts) for part in self._parts.values()]
        return {host: one for found in each for host, one in found.items()}

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
        """Devices whose last `ensure` is newer than these snapshots. The results of the others are removed."""
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
        readers: dict[str, asyncio.Task[None]] = {}

        async def read(part: Scheduler) -> None:
            async for hint in part.watch():
                await hints.put(hint)

        async def follow(group: asyncio.TaskGroup) -> None:
            while True:
                self._more.clear()
                for name in self._parts.keys() - readers.keys():
                    readers[name] = group.create_task(read(self._parts[name]))
                await self._more.wait()

        async def listen() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(follow(group))

        # A task group must not be open over a yield: another task may close this generator.
        listening = asyncio.ensure_future(listen())
        try:
            while True:
                while not hints.empty():  # no task per hint when there are many
                    yield hints.get_nowait()
                next_one = asyncio.ensure_future(hints.get())
                try:
                    await asyncio.wait({next_one, listening}, return_when=asyncio.FIRST_COMPLETED)
                    if not next_one.done():
                        await listening  # it ends only by an error, which is raised here
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
        # Called for each start, nearly always with the same spec.
        last = self._adapted_last.get((name, spec.spec_hash))
        if last is None or last[0] is not spec:
            last = spec, self._adapt_spec(name, spec)
            self._adapted_last[name, spec.spec_hash] = last
        return last[1]

    def _adapted(self, name: str, specs: Iterable[AgentSpec]) -> list[AgentSpec]:
        return [self._adapt(name, spec) for spec in specs]

    async def _open_all(self) -> None:
        for name in sorted(self.lacks):
            try:
                await self._open(name, whole=False)
            except WatchdogError as error:
                raise TransientError(
                    f"{name}, which runs a part of the fleet, cannot be opened: {error}"
                ) from error

    def _shared(self) -> Capabilities:
        """The capabilities that all of them have."""
        each = [part.capabilities for part in self._parts.values()]
        return Capabilities(
            replaces_in_place=all(one.replaces_in_place for one in each),
            restarts=all(one.restarts for one in each),
            steers=all(one.steers for one in each),
        )
