"""Which replica reconciles which devices: one lease per shard, held by one replica at a time.

Locks are only advisory, and a process can be suspended between a check and an action. So a lease ends at a fixed time
of its holder's own clock and is checked again before each step, and each commit of an epoch names the lock that must
still be held. Even if two replicas both think they hold a shard, each device gets only one agent, because every start
is a compare-and-set of the device's epoch (S2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import Final, Protocol

from nomad_watchdog.errors import FencedError
from nomad_watchdog.ids import Shard, Slug, shard_of
from nomad_watchdog.model import Monotonic
from nomad_watchdog.registry import CommitGuard


@dataclass(frozen=True, slots=True)
class Term:
    """One uninterrupted time in which a replica holds a shard."""

    number: int
    """Increases each time that any replica acquires the lock."""
    began_at: Monotonic
    """What was read earlier must not be used for a decision: another replica may have acted since."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard and its holder, as all replicas see it."""

    shard: Shard
    holder: str
    """The replica's ID; "" = no replica."""
    api: str = ""
    """Address of the holder's API; "" = not known."""
    since: float = 0.0
    """Wall time of the acquisition, by the holder's clock."""
    term: int = 0


@dataclass(frozen=True, slots=True)
class Replica:
    """A control plane that is running."""

    id: str
    api: str
    since: float
    """Wall time of its start, by its own clock."""
    shards: int
    version: str
    config: str = ""
    """Digest of the class specs that it is configured with (`class_set.digest`); "" = an older version."""
    advertise: str = ""
    """The address that it gives to agents; "" = an older version."""

    @property
    def address(self) -> str:
        """Where agents reach it, as far as known."""
        return self.advertise or self.api


def may_be_called(replica: Replica, tls: SSLContext | None) -> bool:
    """Whether our token may be sent to this replica: in plain text only if our own API uses no TLS. `tls`: for calls
    to replicas; None = our API uses none. The address comes from Consul, and whoever can write there chooses it."""
    return replica.api.startswith("https://" if tls is not None else ("http://", "https://"))


class Leases(Protocol):
    """The leases as one replica knows them. Only `run`, `announce` and `release` do I/O."""

    shards: int
    replica: str
    """Our own ID."""
    advertise: str
    """The address that we give to agents; "" = not known."""
    problem: str
    """Why no lease can be held now; "" = there is no reason."""
    changed: asyncio.Event
    """Set whenever `terms` or the addresses of `replicas` may have changed."""

    def terms(self) -> Mapping[Shard, Term]:
        """The shards that are ours now; empty as soon as our leases have ended by our own clock."""
        ...

    def guards(self, slugs: Collection[Slug]) -> Sequence[CommitGuard]:
        """The guards of a commit for these devices."""
        ...

    def all(self) -> Sequence[Lease]:
        """Every shard and its holder, as last seen."""
        ...

    @property
    def current(self) -> bool:
        """Whether `all` and `replicas` are up to date: they can be read, and our own session is valid."""
        ...

    def replicas(self) -> Sequence[Replica]:
        """Every control plane that is running, including ours, as last seen."""
        ...

    def configs(self) -> Sequence[str] | None:
        """The digests of the other replicas' configurations; "" for an older version. None = the other replicas are not
        known now, or they do not know our digest yet."""
        ...

    async def announce(self, config: str) -> None:
        """Publish the digest of our own class specs. Never raises: it is retried until it is published."""
        ...

    def knows_all_replicas(self) -> bool:
        """Whether a control plane that is not among `replicas` is gone. Where only one can run at a time and it is not
        among `replicas`: whether it is this one."""
        ...

    async def run(self) -> None:
        """Acquire and renew leases until cancelled. Outages are retried, and reported in `problem`."""
        ...

    async def release(self) -> None:
        """Release all leases at once, so that a successor need not wait. Never raises; has a timeout."""
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
    """All shards, always: for a single pass that an operator runs without the service."""

    shards: int = 1
    replica: str = "this"
    advertise: str = ""
    problem: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    others: Sequence[str] = ()
    """Digests of the configurations of running replicas."""

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
        """There is no other replica."""

    def knows_all_replicas(self) -> bool:
        return False

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def release(self) -> None:
        return
