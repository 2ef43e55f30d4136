"""Detects placements that wait forever: how long each has made no progress, and when to start the next epoch instead.

A scheduler may leave a start unfinished without reporting it. For example, a Nomad client does not see an allocation
that is to fetch the disk of an allocation on a purged node, until something else is placed on the same client
(`Node.GetClientAllocs`: the answer to such an allocation does not move the index that the client waits for). Only
another placement ends this.

No I/O; times are from our own clock. The scheduler's times only show whether something has changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Monotonic, Placement, PlacementState

WAITING: Final = frozenset(
    {PlacementState.PENDING, PlacementState.STARTING, PlacementState.RESTARTING}
)
BACKOFF_S: Final = 300.0
"""A failing agent waits at most this long for its scheduler's next attempt: `reschedule.max_delay` of the
Nomad template; Kubernetes (https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#restart-policy)."""
MAX_DOUBLINGS: Final = 3
"""Maximum number of doublings. The time limit of a device doubles with each placement in a row that was given up, so
that an agent with a slow start can succeed."""
REMEMBERED_S: Final = 3600.0
"""Time after which a placement that was given up no longer counts, in seconds."""

_Mark = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Wait:
    mark: _Mark
    since: Monotonic


@dataclass(slots=True)
class StuckPlacements:
    """State of the placements that wait. Bounded by the number of placements."""

    _waits: dict[Slug, dict[str, _Wait]] = field(default_factory=dict)
    _given_up: dict[Slug, tuple[int, Monotonic]] = field(default_factory=dict)
    """For devices whose agent has not run since: number of placements in a row that were given up, and when the last
    one was."""
    _replaced: deque[Monotonic] = field(default_factory=deque)
    """When placements of any device were given up."""

    def seen(
        self,
        placements: Mapping[Slug, tuple[Placement, ...]],
        only: Collection[Slug] | None,
        now: Monotonic,
    ) -> None:
        """Record a listing. `only`: the devices for which it is complete; None = all."""
        if only is None:
            for slug in self._waits.keys() - placements.keys():
                del self._waits[slug]
            self._given_up = {k: v for k, v in self._given_up.items() if now - v[1] <= REMEMBERED_S}
        for slug in placements if only is None else only:
            found = placements.get(slug, ())
            if any(one.state is PlacementState.RUNNING for one in found):
                self._given_up.pop(slug, None)
            before = self._waits.get(slug, {})
            waits = {}
            for one in found:
                if one.state in WAITING:
                    known, mark = before.get(one.ref), _mark(one)
                    waits[one.ref] = known if known and known.mark == mark else _Wait(mark, now)
            if waits:
                self._waits[slug] = waits
            else:
                self._waits.pop(slug, None)

    def lasts_s(self, placement: Placement, now: Monotonic) -> float:
        """Seconds since a waiting placement last made progress; 0 for any other."""
        wait = self._waits.get(placement.slug, {}).get(placement.ref)
        return now - wait.since if wait is not None and placement.state in WAITING else 0.0

    def limit_s(self, placement: Placement, most_s: float) -> float:
        """Maximum time for which this placement may make no progress, in seconds. `most_s`: the limit of a first
        start."""
        doublings = min(self._given_up.get(placement.slug, (0, 0.0))[0], MAX_DOUBLINGS)
        longer_s = BACKOFF_S if placement.state is PlacementState.RESTARTING else 0.0
        return float(most_s * 2**doublings + longer_s)

    def is_stalled(self, placement: Placement, most_s: float, now: Monotonic) -> bool:
        """Whether the next epoch should be started instead. Never while no node has the placement: the next epoch
        would wait in the same queue. `most_s`: 0 = never."""
        return (
            most_s > 0
            and not placement.queued
            and self.lasts_s(placement, now) > self.limit_s(placement, most_s)
        )

    def slugs(self) -> Collection[Slug]:
        """Devices with a placement that waits."""
        return self._waits.keys()

    def given_up(self, slug: Slug, now: Monotonic) -> None:
        """Record that the next epoch is started in place of a placement that waited for too long."""
        self._given_up[slug] = self._given_up.get(slug, (0, now))[0] + 1, now
        self._replaced.append(now)

    def room(self, most: int, period_s: float, now: Monotonic) -> int:
        """Number of placements that may still be given up now, with a maximum of `most` within `period_s` seconds."""
        while self._replaced and now - self._replaced[0] > period_s:
            self._replaced.popleft()
        return max(0, most - len(self._replaced))


def _mark(placement: Placement) -> _Mark:
    """A value that changes when the scheduler makes progress with a start."""
    return placement.state, placement.waits_since, placement.restarts, placement.node
