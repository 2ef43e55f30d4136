"""(who holds which shard, who is there, me) → what I should take and give up.

An even spread that moves as little as it can: a replica gives up only what is more than its fair share,
and takes only what nobody holds. With one shard that is plain leader election, and a replica that joins
takes nothing from a holder.

Rank is by rendezvous hashing (Thaler and Ravishankar, 1998): who joins and leaves again gets the same
shards, and two replicas that look for a free one begin at different ones.
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
    """How much a shard belongs to a replica; only comparisons mean something."""
    return hashlib.sha256(f"{shard} {replica}".encode()).digest()


def fair_shares(loads: Mapping[str, int], shards: int) -> dict[str, int]:
    """How many shards each replica should hold: equal but for one, and the ones that are over go to
    those that hold most now, so that nothing moves without need."""
    if not loads:
        return {}
    least, over = divmod(shards, len(loads))
    ranked = sorted(loads, key=lambda replica: (-loads[replica], replica))
    return {replica: least + (place < over) for place, replica in enumerate(ranked)}


def moves(holders: Mapping[Shard, str], replicas: Collection[str], me: str) -> Moves:
    """What `me` should do next.

    `holders` names every shard's holder, NOBODY for a free one; a holder that is not among `replicas` is
    leaving and keeps what it has until it lets go. Nothing for a `me` that is not among them.
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
