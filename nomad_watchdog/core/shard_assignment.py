"""(holders of the shards, replicas, this replica) → which shards to take and to give up.

Shards are spread evenly with as few moves as possible: a replica gives up only what exceeds its fair share, and takes
only free shards. With one shard this is plain leader election, and a replica that joins takes nothing from a holder.

Shards are ranked by rendezvous hashing (Thaler and Ravishankar, 1998): a replica that leaves and joins again gets the
same shards, and two replicas that look for a free one begin at different ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from nomad_watchdog.ids import Shard

NOBODY = ""
"""Holder of a free shard."""


@dataclass(frozen=True, slots=True)
class Moves:
    """Shards to take, best first, and to give up."""

    take: tuple[Shard, ...] = ()
    give: tuple[Shard, ...] = ()


def weight(shard: Shard, replica: str) -> bytes:
    """Rank of a shard for a replica; only comparisons are meaningful."""
    return hashlib.sha256(f"{shard} {replica}".encode()).digest()


def fair_shares(loads: Mapping[str, int], shards: int) -> dict[str, int]:
    """The number of shards that each replica should hold. The numbers differ by at most one; the remainder goes to
    the replicas that hold most now, to avoid moves."""
    if not loads:
        return {}
    least, over = divmod(shards, len(loads))
    ranked = sorted(loads, key=lambda replica: (-loads[replica], replica))
    return {replica: least + (place < over) for place, replica in enumerate(ranked)}


def moves(holders: Mapping[Shard, str], replicas: Collection[str], me: str) -> Moves:
    """The shards that `me` should take or give up next.

    `holders`: the holder of every shard, NOBODY = free. A holder that is not in `replicas` is leaving and keeps its
    shards until it releases them. Empty if `me` is not in `replicas`.
    """
    if me not in replicas:
        return Moves()
    counted = Counter(holders.values())
    loads = {replica: counted[replica] for replica in replicas}
    share = fair_shares(loads, len(holders))[me]
    mine = [shard for shard, holder in holders.items() if holder == me]
    if len(mine) > share:
        mine.sort(key=lambda shard: weight(shard, me))
        return Moves(give=tuple(mine[: len(mine) - share]))
    free = [shard for shard, holder in holders.items() if holder == NOBODY]
    free.sort(key=lambda shard: weight(shard, me), reverse=True)
    return Moves(take=tuple(free[: share - len(mine)]))
