"""In-memory leases for the simulation: hints that may be wrong.

Shards are spread by the real `core.shard_assignment`. A holder on a `blurred` board keeps believing
in its lease for a while after expiry, like a suspended process: then two hold one shard, and no
guard stops a commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import shard_assignment
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.model import Monotonic
from nomad_watchdog.registry import CommitGuard
from nomad_watchdog.replicas.leases import Lease, Replica, Term
from tests.simulation.faults import Weather

TTL_S: Final = 4.0
RENEW_S: Final = 1.0
BLUR_S: Final = 8.0


class Board:
    """Which replica holds which shard, until when."""

    def __init__(self, shards: int, *, blurred: bool) -> None:
        self.blur_s = BLUR_S if blurred else 0.0
        self.holders: dict[Shard, str] = {Shard(n): shard_assignment.NOBODY for n in range(shards)}
        self.until: dict[Shard, float] = {}
        self.members: dict[str, float] = {}
        self.configs: dict[str, str] = {}
        self.taken = 0

    def expire(self, now: float) -> None:
        """Free leases that were not renewed in time, and forget replicas without a heartbeat."""
        self.members = {name: until for name, until in self.members.items() if until > now}
        for shard, holder in self.holders.items():
            if holder != shard_assignment.NOBODY and self.until[shard] <= now:
                self.holders[shard] = shard_assignment.NOBODY


class BoardLeases:
    """One replica's view of the board."""

    def __init__(self, board: Board, replica: str, clock: Clock, weather: Weather) -> None:
        self.shards = len(board.holders)
        self.replica = replica
        self.advertise = ""
        self.problem = ""
        self.changed = asyncio.Event()
        self._board = board
        self._clock = clock
        self._weather = weather
        self._terms: dict[Shard, Term] = {}
        self._until = Monotonic(0.0)

    def terms(self) -> Mapping[Shard, Term]:
        return self._terms if self._clock.monotonic() < self._until else {}

    def guards(self, slugs: Collection[Slug]) -> Sequence[CommitGuard]:  # as in the protocol
        return ()

    def all(self) -> Sequence[Lease]:
        return [Lease(shard, holder) for shard, holder in self._board.holders.items()]

    @property
    def current(self) -> bool:
        return True

    def replicas(self) -> Sequence[Replica]:
        return []

    def configs(self) -> Sequence[str] | None:
        now = self._clock.monotonic()
        if self.replica not in self._board.members:
            return None
        others = self._board.members.items() - {(self.replica, self._board.members[self.replica])}
        return [self._board.configs.get(name, "") for name, until in others if until > now]

    async def announce(self, config: str) -> None:
        self._board.configs[self.replica] = config

    def knows_all_replicas(self) -> bool:
        return False

    async def run(self) -> None:
        while True:
            if not self._weather.hits(self._weather.refused):
                self._renew()
            await asyncio.sleep(RENEW_S * self._weather.chance.uniform(0.5, 1.5))

    async def release(self) -> None:
        """Does nothing: a simulated process dies, and never releases its leases."""

    def _renew(self) -> None:
        board, now = self._board, self._clock.monotonic()
        board.expire(now)
        board.members[self.replica] = now + TTL_S
        moves = shard_assignment.moves(board.holders, list(board.members), self.replica)
        for shard in moves.give:
            board.holders[shard] = shard_assignment.NOBODY
        for shard in moves.take:
            board.taken += 1
            board.holders[shard] = self.replica
            self._terms = {**self._terms, shard: Term(board.taken, now)}
        mine = {shard for shard, holder in board.holders.items() if holder == self.replica}
        self._terms = {shard: term for shard, term in self._terms.items() if shard in mine}
        for shard in mine:
            # A restart takes over its predecessor's shards, in a new term.
            if shard not in self._terms:
                board.taken += 1
                self._terms = {**self._terms, shard: Term(board.taken, now)}
            board.until[shard] = now + TTL_S
        self._until = Monotonic(now + TTL_S + board.blur_s)
        self.changed.set()
