"""Placements that wait forever: how long each has made no progress, and when the next epoch is started instead.

A scheduler may leave a start unfinished without saying so. A Nomad client, for example, does not see an
allocation that is to fetch the disk of an allocation on a purged node, until something else is placed on
the same client (`Node.GetClientAllocs`: the answer to such an allocation does not move the index that the
client waits for). Nothing but another placement ends that.

No I/O; times are ours. What a scheduler says of its own clock only tells whether something has changed.
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
"""The limit of a device doubles with each placement in a row that was given up, so that an agent whose start
really takes long gets there. This often at most."""
REMEMBERED_S: Final = 3600.0
"""Placements that were given up longer ago count no more."""

_Mark = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Wait:
    mark: _Mark
    since: Monotonic


@dataclass(slots=True)
class StuckPlacements:
    """What is remembered of the placements that wait. Bounded by the number of placements."""

    _waits: dict[Slug, dict[str, _Wait]] = field(default_factory=dict)
    _given_up: dict[Slug, tuple[int, Monotonic]] = field(default_factory=dict)
    """Of devices whose agent has not run since: placements in a row that were given up, and when the last."""
    _replaced: deque[Monotonic] = field(default_factory=deque)
    """When placements of any device were given up."""

    def seen(
        self,
        placements: Mapping[Slug, tuple[Placement, ...]],
        only: Collection[Slug] | None,
        now: Monotonic,
    ) -> None:
        """Take a listing. `only`: the devices that it is complete for; None = all."""
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
        """How long this placement may make no progress, seconds. `most_s`: the limit of a first start."""
        doublings = min(self._given_up.get(placement.slug, (0, 0.0))[0], MAX_DOUBLINGS)
        longer_s = BACKOFF_S if placement.state is PlacementState.RESTARTING else 0.0
        return float(most_s * 2**doublings + longer_s)

    def is_stalled(self, placement: Placement, most_s: float, now: Monotonic) -> bool:
        """Whether the next epoch should be started instead. Never while no node has it: then the next epoch
        would wait in the same queue. `most_s` = 0: never."""
        return (
            most_s > 0
            and not placement.queued
            and self.lasts_s(placement, now) > self.limit_s(placement, most_s)
        )

    def slugs(self) -> Collection[Slug]:
        """Devices with a placement that waits."""
        return self._waits.keys()

    def given_up(self, slug: Slug, now: Monotonic) -> None:
        """The next epoch is being started in place of a placement that waited for too long."""
        self._given_up[slug] = self._given_up.get(slug, (0, now))[0] + 1, now
        self._replaced.append(now)

    def room(self, most: int, period_s: float, now: Monotonic) -> int:
        """How many more may be given up now, if at most `most` may be within `period_s` seconds."""
        while self._replaced and now - self._replaced[0] > period_s:
            self._replaced.popleft()
        return max(0, most - len(self._replaced))


def _mark(placement: Placement) -> _Mark:
    """What changes when the scheduler gets further with a start."""
    return placement.state, placement.waits_since, placement.restarts, placement.node
