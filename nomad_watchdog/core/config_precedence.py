"""Decides whether a replica's own class specs come into force.

One set of class specs is in force for the whole fleet, and every replica follows it. It changes only when a replica
starts or reloads its configuration, by this rule:

1. If no other living replica is configured with the set in force, the replica's own set comes into force.
   This applies to a lone replica, and to the last replica of a rollback.
2. If its own set was never in force before, it comes into force: it is the first replica of a rolling upgrade.
3. Otherwise the replica follows the set in force, and reports that it is configured differently. An old
   replica that restarts during an upgrade does not undo it.

A replica that stops or crashes changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

MAX_SUPERSEDED: Final = 16
"""Number of superseded sets that are remembered; an older one counts as new again."""


@dataclass(frozen=True, slots=True)
class ConfigStanding:
    """The set in force, identified by its digest."""

    number: int
    """Increases by one with each change, from 1."""
    digest: str
    superseded: tuple[str, ...] = ()
    """Digests that were in force before, the latest last; never the one in force."""


def wins(own: str, standing: ConfigStanding | None, others: Iterable[str]) -> bool:
    """Whether `own` comes into force when a replica configured with it starts or reloads. False if it is in force
    already.

    `standing`: None = no set was ever in force. `others`: the digests that the other living replicas are configured
    with; "" = not reported (an older version)."""
    if standing is None:
        return True
    if own == standing.digest:
        return False
    return standing.digest not in others or own not in standing.superseded


def succeed(standing: ConfigStanding | None, own: str) -> ConfigStanding:
    """The set in force after `own` has come into force."""
    if standing is None:
        return ConfigStanding(1, own)
    before = (one for one in (*standing.superseded, standing.digest) if one != own)
    return ConfigStanding(standing.number + 1, own, tuple(dict.fromkeys(before))[-MAX_SUPERSEDED:])
