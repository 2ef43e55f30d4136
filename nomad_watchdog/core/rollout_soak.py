"""Agents of a new version, from the moment that they are ready until they have lasted.

A version that never gets ready stops its own roll-out (`rollout.admit`). One that starts well and dies late
would go on from window to window: so agents of a new version are watched for a while, fill the window until
then, and when too many of them end by themselves the version is bad. Pure: the caller gives runs and time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, Monotonic

ENOUGH: Final = 0.9
"""Share of a class's devices on which a version must have lasted."""


@dataclass(frozen=True, slots=True)
class SoakLimits:
    """`soak_s` 0 = nothing is watched."""

    soak_s: float = 0.0
    """An agent that was ready for so long, seconds, has proved its version."""
    deaths: int = 3
    """So many devices whose agent ended before that, or all where there are fewer, make a version bad."""


@dataclass(frozen=True, slots=True)
class ObservedRun:
    """One agent of the new version, as it is seen now."""

    slug: Slug
    epoch: Epoch
    instance: str
    restarts: int
    node: str
    ready: bool
    lost: bool = False
    """Its node does not answer: what becomes of it says nothing about the version."""

    @property
    def life(self) -> tuple[Epoch, str, int]:
        """What changes when the agent is another one, or the same begins again."""
        return self.epoch, self.instance, self.restarts


@dataclass(slots=True)
class _Seen:
    run: ObservedRun
    ready_at: Monotonic | None = None
    lost: bool = False


@dataclass(slots=True)
class Soak:
    """What is known of one version of one class."""

    limits: SoakLimits
    lasted: set[Slug] = field(default_factory=set)
    """Devices with an agent that was ready for long enough."""
    died: dict[Slug, str] = field(default_factory=dict)
    """Devices whose agent was ready and ended too soon, and the node that it was on."""
    _seen: dict[Slug, _Seen] = field(default_factory=dict)
    _nodes: set[str] = field(default_factory=set)

    def look(
        self, runs: Iterable[ObservedRun], wanted: frozenset[Slug] | set[Slug], now: Monotonic
    ) -> None:
        """Take all live runs of the version. `wanted`: devices that shall still have this version; what ends
        for another was told to."""
        found = {run.slug: run for run in runs}
        for slug, seen in list(self._seen.items()):
            run = found.get(slug)
            if run is not None and run.life == seen.run.life:
                continue
            if slug in wanted and self._too_soon(seen, now):
                self.died[slug] = seen.run.node
            del self._seen[slug]
        for slug, run in found.items():
            seen = self._seen.setdefault(slug, _Seen(run))
            self._nodes.add(run.node)
            seen.lost = seen.lost or run.lost
            if run.ready and seen.ready_at is None:
                seen.ready_at = now
            if seen.ready_at is not None and now - seen.ready_at >= self.limits.soak_s:
                self.lasted.add(slug)

    def _too_soon(self, seen: _Seen, now: Monotonic) -> bool:
        ready_at = seen.ready_at
        return ready_at is not None and now - ready_at < self.limits.soak_s and not seen.lost

    def soaking(self) -> int:
        """Agents that are ready and have not lasted yet: they take room in the window."""
        return sum(
            seen.ready_at is not None and slug not in self.lasted
            for slug, seen in self._seen.items()
        )

    def is_bad(self, fleet: int) -> bool:
        """Whether the version is not to be had. `fleet`: devices of the class.

        Ends on one node only, of a version that runs on others too, are the node's fault: a drain, say."""
        if len(self.died) < max(1, min(self.limits.deaths, fleet)):
            return False
        return len(self._nodes) < 2 or len(set(self.died.values())) > 1

    def is_good(self, wanted: frozenset[Slug] | set[Slug]) -> bool:
        """Whether nearly every device that shall have the version has had an agent of it that lasted, and
        none is under way to it: one device that nothing runs for must not keep a version from its proof."""
        lasted = len(wanted & self.lasted)
        return lasted > 0 and lasted >= ENOUGH * len(wanted) and not self.soaking()
