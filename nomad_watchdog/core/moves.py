"""Requests that agents leave the placement that they have now: of a drained node, an overloaded host, an unbalanced fleet.

A controller says which placements are to be left, and why; the planner replaces them inside the one window of the fleet,
in the order of `Move`. A request names a placement, so it is met when that placement is gone, whoever ended it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.core.actions import Move
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Placement


@dataclass(frozen=True, slots=True)
class MoveRequest:
    """That one placement is to be left."""

    move: Move
    ref: str
    """`Placement.ref` of the placement."""
    reason: str
    """In words, such as "node n1 is being drained"."""
    waits_for: str = ""
    """Why it can't be met now, in words, such as "no other node takes agents"; "" = it can. Until then the placement is
    not replaced for a less urgent reason either."""
    epoch: int = 0
    """Epoch of the placement, for a scheduler that updates a placement in place, with the same reference; 0 = any."""

    def concerns(self, placement: Placement) -> bool:
        """Whether this is the placement to leave."""
        return self.ref == placement.ref and self.epoch in (0, placement.epoch)


Requested = Mapping[Slug, MoveRequest]
"""At most one request for each device."""
NONE_REQUESTED: Final[Requested] = {}


def combined(*sources: Requested) -> Requested:
    """The requests of several controllers; of two for one device, the one whose reason comes first."""
    found: dict[Slug, MoveRequest] = {}
    for source in sources:
        for slug, request in source.items():
            if slug not in found or request.move < found[slug].move:
                found[slug] = request
    return found
