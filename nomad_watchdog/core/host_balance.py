"""When hosts have about the same number of agents, and the fewest moves until they have."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.model import Placement

SHARE: Final = 0.10
"""The hosts are balanced when the largest and the smallest number of agents differ by at most this share of the mean …"""
LEAST: Final = 1
"""… or by this number, if that is more."""


def allowed(counts: Mapping[str, int]) -> int:
    """The difference of the numbers of agents that counts as balanced."""
    mean = sum(counts.values()) / len(counts) if counts else 0.0
    return max(LEAST, int(mean * SHARE))


def spread(counts: Mapping[str, int]) -> int:
    """The difference between the largest and the smallest number of agents."""
    return max(counts.values()) - min(counts.values()) if counts else 0


@dataclass(frozen=True, slots=True)
class MovePlan:
    """The fewest moves that balance the hosts."""

    leave: tuple[Placement, ...]
    """The placements to leave, in order."""
    receive: Mapping[str, int]
    """Host → number of agents that it gets, of those and of the agents in flight. Hosts that get none are left out."""


def plan_moves(
    counts: Mapping[str, int], movable: Mapping[str, tuple[Placement, ...]], in_flight: int
) -> MovePlan:
    """Always from a host with the most agents that may leave it to one with the fewest. Parameters as of `HostView`."""
    loads, receive = _Loads(counts), Counter[str]()
    for _ in range(in_flight if counts else 0):
        receive[loads.add()] += 1
    left = {host: iter(some) for host, some in movable.items() if some}
    fullest = [(-loads.of[host], host) for host in left]
    heapq.heapify(fullest)
    most, leave = allowed(counts), []
    while fullest:
        count, host = fullest[0]
        if -count != loads.of[host]:
            heapq.heapreplace(fullest, (-loads.of[host], host))
            continue
        if loads.of[host] - loads.least() <= most:
            break
        placement = next(left[host], None)
        if placement is None:
            heapq.heappop(fullest)
            continue
        leave.append(placement)
        loads.remove(host)
        grown = loads.add()
        receive[grown] += 1
        if grown in left:
            heapq.heappush(fullest, (-loads.of[grown], grown))
    return MovePlan(tuple(leave), receive)


class _Loads:
    """Numbers of agents per host, with quick access to the smallest one. An entry of the heap that is not the number of
    its host any more is outdated."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.of = dict(counts)
        self._heap = [(count, host) for host, count in self.of.items()]
        heapq.heapify(self._heap)

    def least(self) -> int:
        while self._heap[0][0] != self.of[self._heap[0][1]]:
            heapq.heappop(self._heap)
        return self._heap[0][0]

    def add(self) -> str:
        """One agent more on the host with the fewest; its name."""
        self.least()
        host = self._heap[0][1]
        self._set(host, self.of[host] + 1)
        return host

    def remove(self, host: str) -> None:
        self._set(host, self.of[host] - 1)

    def _set(self, host: str, count: int) -> None:
        self.of[host] = count
        heapq.heappush(self._heap, (count, host))
