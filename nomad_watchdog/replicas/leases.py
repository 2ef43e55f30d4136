"""Who reconciles which devices: a lease a shard, held by one replica at a time.

A lease is advice, not truth: locks are advisory, and a process can sleep between looking and acting. So a
holder's right is boxed in time by its own clock and asked for again before each step, each commit of an
epoch names the lock that must still be held, and even two that both believe to hold a shard do no harm,
because every start is a compare-and-set of the device's epoch (S2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from nomad_watchdog.errors import FencedError
from nomad_watchdog.ids import Shard, Slug, shard_of
from nomad_watchdog.model import Monotonic
from nomad_watchdog.registry import CommitGuard


@dataclass(frozen=True, slots=True)
class Term:
    """One unbroken spell of holding a shard."""

    number: int
    """Goes up with each taking of the lock, whoever takes it."""
    began_at: Monotonic
    """What was read before this is no ground for a decision: another may have acted since."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard and its holder, as all replicas see it."""

    shard: Shard
    holder: str
    """The replica's id; "" = nobody."""
    api: str = ""
    """Where the holder's API is, if it said so."""
    since: float = 0.0
    """Wall time of the taking, by the holder's clock."""
    term: int = 0


@dataclass(frozen=True, slots=True)
class Replica:
    """A control plane that is there."""

    id: str
    api: str
    since: float
    """Wall time of its start, by its own clock."""
    shards: int
    version: str
    config: str = ""
    """Digest of the class specs that it is configured with (`class_set.digest`); "" = an older version."""
    advertise: str = ""
    """The address that it tells agents; "" = its version does not say."""

    @property
    def address(self) -> str:
        """Where agents reach it, as far as is known."""
        return self.advertise or self.api


class Leases(Protocol):
    """What the reconciler asks. None of it does I/O but `run` and `release`."""

    shards: int
    replica: str
    """Our own id."""
    advertise: str
    """The address that we tell agents; "" = it is not known."""
    problem: str
    """Why nothing can be held at the moment, in words; "" when there is no reason."""
    changed: asyncio.Event
    """Set whenever `terms` or the addresses of `replicas` may have changed."""

    def terms(self) -> Mapping[Shard, Term]:
        """The shards that are ours now; empty as soon as our own clock can't vouch for it."""
        ...

    def guards(self, slugs: Collection[Slug]) -> Sequence[CommitGuard]:
        """What a commit for these devices must name."""
        ...

    def all(self) -> Sequence[Lease]:
        """Every shard and its holder, as last seen."""
        ...

    @property
    def current(self) -> bool:
        """Whether `all` and `replicas` are of now: they can be read, and our own word among them is good."""
        ...

    def replicas(self) -> Sequence[Replica]:
        """Every control plane that is there, ours included, as last seen."""
        ...

    def configs(self) -> Sequence[str] | None:
        """The digests that the other replicas are configured with, as far as they say; None = it is not known who is
        there now, or the others don't know of ours yet."""
        ...

    async def announce(self, config: str) -> None:
        """Let the others know the digest of our own class specs. Never raises: it is repeated until it is known."""
        ...

    def vouches(self) -> bool:
        """Whether a control plane that is not among `replicas` is gone. Where there is one at a time that
        does not appear in `replicas`, whether it is this one."""
        ...

    async def run(self) -> None:
        """Take part until cancelled. Outages are waited out, and told in `problem`."""
        ...

    async def release(self) -> None:
        """Let go of all at once, so that a successor need not wait. Never raises; bounded in time."""
        ...


def check(leases: Leases, slug: Slug) -> Term:
    """The term under which we may act on a device now. Raises FencedError when it is not ours."""
    term = leases.terms().get(shard_of(slug, leases.shards))
    if term is None:
        raise FencedError("the lease of the device's shard is not ours")
    return term


FIRST: Final = Term(1, Monotonic(0.0))


@dataclass(slots=True)
class SoleOwner:
    """All shards, always: for one pass by hand, where an operator is the only one who acts."""

    shards: int = 1
    replica: str = "this"
    advertise: str = ""
    problem: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    others: Sequence[str] = ()
    """What replicas that are there are configured with."""

    def terms(self) -> Mapping[Shard, Term]:
        return dict.fromkeys(map(Shard, range(self.shards)), FIRST)

    def guards(self, slugs: Collection[Slug]) -> Sequence[CommitGuard]:  # noqa: ARG002  # as the protocol has it
        return ()

    def all(self) -> Sequence[Lease]:
        return [Lease(Shard(number), self.replica) for number in range(self.shards)]

    @property
    def current(self) -> bool:
        return True

    def replicas(self) -> Sequence[Replica]:
        return []

    def configs(self) -> Sequence[str] | None:
        return self.others

    async def announce(self, config: str) -> None:
        """Nobody asks."""

    def vouches(self) -> bool:
        return False

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def release(self) -> None:
        return
