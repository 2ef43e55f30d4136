"""Which devices we may decide about now: those of our shards that both stores were read for since.

A lease that has just been taken is no licence yet: its last holder may have written after what we know. So
a shard counts from the moment that the registry and the scheduler were both read, in full, after its term
began (S8), and that the scheduler was prepared for it: its last holder's parent jobs may name that one's
address.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from nomad_watchdog.ids import Shard, Slug, shard_of
from nomad_watchdog.model import Monotonic
from nomad_watchdog.replicas.leases import Leases, Term

_T = TypeVar("_T")
_MAX_KNOWN = 1_000_000
"""Slugs whose shard is remembered; hashing one costs 2 µs."""


class ShardOwnership:
    """The reader of `leases` for one fleet."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._known: dict[Slug, Shard] = {}
        self.registry_read_at = Monotonic(0.0)
        """When the last full read of the registry was begun."""
        self.looked_at = Monotonic(0.0)
        """When the last full snapshot of the scheduler was begun."""
        self.prepared: dict[Shard, int] | None = None
        """Shard → number of the term in which the scheduler was prepared for it; None = it is not asked for, by
        a command that looks once."""

    def shard(self, slug: Slug) -> Shard:
        found = self._known.get(slug)
        if found is None:
            if len(self._known) > _MAX_KNOWN:
                self._known.clear()
            found = self._known[slug] = shard_of(slug, self._leases.shards)
        return found

    def shards(self) -> frozenset[Shard]:
        """Those that we may decide about."""
        read_at = min(self.registry_read_at, self.looked_at)
        return frozenset(
            shard
            for shard, term in self._leases.terms().items()
            if term.began_at <= read_at and self._is_prepared(shard, term)
        )

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
