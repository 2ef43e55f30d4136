"""(own configuration, set in force, other replicas) → whether our own class specs come into force.

One set of class specs is in force for the whole fleet, and every replica follows it. It changes only when a
replica starts or reads its configuration again, and then by this rule:

1. If no other replica that is there is configured with the set in force, the replica's own comes into force.
   So a lone replica always has its way, and so does the last one of a rollback.
2. If its own was never in force before, it comes into force: it is the first replica of a rolling upgrade.
3. Otherwise the replica follows the set in force, and reports that it is configured differently. So an old
   replica that restarts in the middle of an upgrade does not undo it.

A replica that ends or crashes changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

MAX_SUPERSEDED: Final = 16
"""Sets that are remembered after they were superseded. An older one counts as new again."""


@dataclass(frozen=True, slots=True)
class ConfigStanding:
    """Which set is in force. A set is known by its digest."""

    number: int
    """Goes up by one with each change, from 1."""
    digest: str
    superseded: tuple[str, ...] = ()
    """Digests that were in force before, the last one at the end; never the one that is in force."""


def wins(own: str, standing: ConfigStanding | None, others: Iterable[str]) -> bool:
    """Whether `own` is to come into force now, as a replica configured with it starts or reloads.

    `standing`: None = no set was ever in force. `others`: the digests that the other living replicas are
    configured with; "" = one that does not say (an older version). False where it is in force already."""
    if standing is None:
        return True
    if own == standing.digest:
        return False
    return standing.digest not in others or own not in standing.superseded


def succeed(standing: ConfigStanding | None, own: str) -> ConfigStanding:
    """What is in force once `own` has come into force."""
    if standing is None:
        return ConfigStanding(1, own)
    before = (one for one in (*standing.superseded, standing.digest) if one != own)
    return ConfigStanding(standing.number + 1, own, tuple(dict.fromkeys(before))[-MAX_SUPERSEDED:])
