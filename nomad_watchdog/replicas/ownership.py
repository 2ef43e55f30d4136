"""Which shards this replica may decide about now, and which replica is the leader.

A lease that was just acquired is not enough: the last holder may have written after our last read. So a shard
counts only once the registry and the scheduler were both read in full after its term began (S8), and once the
scheduler was prepared for it: the parent jobs of the last holder may name that replica's address.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

from nomad_watchdog.ids import Shard, Slug, shard_of
from nomad_watchdog.model import Monotonic
from nomad_watchdog.replicas.leases import Leases, Term

_T = TypeVar("_T")
LEADER_SHARD: Final = Shard(0)
"""Its holder is the leader: it alone publishes the events of all replicas, judges roll-outs and migrations,
decides the moves of a rebalance, and scales the pools. There is a shard 0 whatever the number of shards is."""
_MAX_KNOWN: Final = 1_000_000
"""Maximum number of slugs whose shard is cached; hashing one takes 2 µs."""


def leader(leases: Leases) -> str:
    """The replica's id; "" = no replica holds the lease."""
    return leases.all()[LEADER_SHARD].holder


def leader_term(leases: Leases) -> Term | None:
    """Our term as the leader; None = we are not the leader."""
    return leases.terms().get(LEADER_SHARD)


def is_leader(leases: Leases) -> bool:
    """Whether we hold the lease of the leader."""
    return leader_term(leases) is not None


class ShardOwnership:
    """The shards of one replica, by its leases."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._known: dict[Slug, Shard] = {}
        self.registry_read_at = Monotonic(0.0)
        """When the last full read of the registry began."""
        self.looked_at = Monotonic(0.0)
        """When the last full snapshot of the scheduler began."""
        self.prepared: dict[Shard, int] | None = None
        """Shard → number of the term in which the scheduler was prepared for it; None = not required, for a
        command that decides once."""

    def shard(self, slug: Slug) -> Shard:
        found = self._known.get(slug)
        if found is None:
            if len(self._known) > _MAX_KNOWN:
                self._known.clear()
            found = self._known[slug] = shard_of(slug, self._leases.shards)
        return found

    def shards(self) -> frozenset[Shard]:
        """The shards that we may decide about."""
        read_at = min(self.registry_read_at, self.looked_at)
        return frozenset(
            shard
            for shard, term in self._leases.terms().items()
            if term.began_at <= read_at and self._is_prepared(shard, term)
        )

    def may_lead(self) -> bool:
        """Whether we are the leader and may decide as such: about shard 0."""
        return LEADER_SHARD in self.shards()

    def _is_prepared(self, shard: Shard, term: Term) -> bool:
        return self.prepared is None or self.prepared.get(shard) == term.number

    def prepare(self, terms: Mapping[Shard, Term]) -> None:
        """The scheduler was prepared for these shards, in terms that had begun before."""
        if self.prepared is not None:
            self.prepared = {shard: term.number for shard, term in terms.items()}

    def unprepared(self) -> bool:
        """The scheduler has to be prepared for a shard of ours."""
        return not all(self._is_prepared(s, term) for s, term in self._leases.terms().items())

    def unseen(self) -> bool:
        """A shard of ours waits for a read of both stores."""
        read_at = min(self.registry_read_at, self.looked_at)
        return any(term.began_at > read_at for term in self._leases.terms().values())

    def of(self, whole: Mapping[Slug, _T]) -> Mapping[Slug, _T]:
        """The part of a mapping by slug that we may decide about; the mapping itself if that is all."""
        ours = self.shards()
        if len(ours) == self._leases.shards:
            return whole
        if not ours:
            return {}
        return {slug: one for slug, one in whole.items() if self.shard(slug) in ours}
