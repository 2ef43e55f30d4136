"""Current addresses of the control plane for agents: those of the living replicas. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Placement, PlacementState

MOST: Final = 8
"""Maximum number of addresses that an agent is given."""


def living(own: str, others: Iterable[str]) -> tuple[str, ...]:
    """Base URLs: our own first, then the others in alphabetical order, each once, at most MOST.

    Addresses with another scheme than our own are omitted: an agent that was given `https://` must not send its
    credential over `http://`. `own`: "" = unknown."""
    scheme = urlsplit(own).scheme
    found = sorted(
        {one for one in others if one and (not own or urlsplit(one).scheme == scheme)} - {own}
    )
    return tuple([own, *found] if own else found)[:MOST]


@dataclass(frozen=True, slots=True)
class Reachability:
    """What is known about the connections between agents and the control plane."""

    addresses: frozenset[str] = frozenset()
    """Base URLs of all living replicas; empty = not all are known."""
    silent: AbstractSet[Slug] = frozenset()
    """Devices whose agent runs and has had time to report, but of which no report arrives."""


UNKNOWN: Final = Reachability()
_NOT_STARTED: Final = (
    PlacementState.PENDING,
    PlacementState.STARTING,
    PlacementState.RESTARTING,
)


def stranded(placement: Placement, reach: Reachability) -> str:
    """Why an agent depends on a replica that is gone, in words; "" = it does not, or that is unknown.

    An agent that does not run can't be fetched. An agent that runs without its reports arriving has no address of a
    living replica. An agent on a lost node may be running, and reports again when the node is back (S3)."""
    if not reach.addresses:
        return ""
    source, api = placement.source, placement.api
    if placement.state in _NOT_STARTED and source and not is_at(source, reach.addresses):
        return f"agent can't be fetched: no replica is at {source} any more"
    unheard = placement.state is PlacementState.RUNNING and placement.slug in reach.silent
    if unheard and api and reach.addresses.isdisjoint(api):
        return f"agent is not heard: no replica is at {', '.join(api)} any more"
    return ""


def is_at(url: str, addresses: Collection[str]) -> bool:
    """Whether a URL is below one of the base URLs."""
    return any(url.startswith(f"{one.rstrip('/')}/") for one in addresses)
