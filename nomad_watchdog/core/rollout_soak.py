"""Observes the agents of a new version from when they are ready until they have lasted for the soak time.

A version that never gets ready stops its own roll-out (`rollout.admit`). A version that starts well and fails later
would be rolled out window by window. Agents of a new version therefore take room in the window during the soak time.
If too many of them end on their own, the version is bad. Pure: the caller passes runs and time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, Monotonic

ENOUGH: Final = 0.9
"""Share of a class's devices on which a version must have lasted, 0 to 1."""


@dataclass(frozen=True, slots=True)
class SoakLimits:
    """Limits of a soak. `soak_s`: 0 = no soak."""

    soak_s: float = 0.0
    """Time for which an agent must be ready to prove its version, in seconds."""
    deaths: int = 3
    """Number of devices whose agent ended before that, or all devices if there are fewer, that make a version bad."""


@dataclass(frozen=True, slots=True)
class ObservedRun:
    """One agent of the new version, as observed now."""

    slug: Slug
    epoch: Epoch
    instance: str
    restarts: int
    node: str
    ready: bool
    lost: bool = False
    """Its node does not answer, so its end says nothing about the version."""

    @property
    def life(self) -> tuple[Epoch, str, int]:
        """A value that changes when the agent is replaced or restarted."""
        return self.epoch, self.instance, self.restarts


@dataclass(slots=True)
class _Seen:
    run: ObservedRun
    ready_at: Monotonic | None = None
    lost: bool = False


@dataclass(slots=True)
class Soak:
    """What is known about one version of a class."""

    limits: SoakLimits
    lasted: set[Slug] = field(default_factory=set)
    """Devices with an agent that was ready for long enough."""
    died: dict[Slug, str] = field(default_factory=dict)
    """Devices whose agent was ready and ended too soon → its node."""
    _seen: dict[Slug, _Seen] = field(default_factory=dict)
    _nodes: set[str] = field(default_factory=set)

    def look(
        self, runs: Iterable[ObservedRun], wanted: frozenset[Slug] | set[Slug], now: Monotonic
    ) -> None:
        """Record all live runs of the version. `wanted`: devices that should still have this version; agents of other
        devices end because they were stopped."""
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

    def excuse(self, slug: Slug) -> None:
        """The agent of a device is replaced on purpose: that it ends says nothing about the version."""
        self._seen.pop(slug, None)

    def ended(self, slug: Slug, now: Monotonic) -> None:
        """The agent of a device has ended by itself."""
        seen = self._seen.pop(slug, None)
        if seen is not None and self._too_soon(seen, now):
            self.died[slug] = seen.run.node

    def epochs(self) -> dict[Slug, Epoch]:
        """Of the live agents that were seen last."""
        return {slug: seen.run.epoch for slug, seen in self._seen.items()}

    def _too_soon(self, seen: _Seen, now: Monotonic) -> bool:
        ready_at = seen.ready_at
        return ready_at is not None and now - ready_at < self.limits.soak_s and not seen.lost

    def soaking(self) -> int:
        """Number of agents that are ready and have not lasted yet; they take room in the window."""
        return sum(
            seen.ready_at is not None and slug not in self.lasted
            for slug, seen in self._seen.items()
        )

    def is_bad(self, fleet: int) -> bool:
        """Whether the version is bad. `fleet`: number of devices of the class.

        If agents ended on only one node and the version also runs on others, the node is the cause, for example a
        drain."""
        if len(self.died) < max(1, min(self.limits.deaths, fleet)):
            return False
        return len(self._nodes) < 2 or len(set(self.died.values())) > 1

    def is_good(self, wanted: frozenset[Slug] | set[Slug]) -> bool:
        """Whether enough (`ENOUGH`) of the devices that should have the version had an agent of it that lasted, and
        no agent is still in its soak. A few devices without an agent must not keep a version from being proved."""
        lasted = len(wanted & self.lasted)
        return lasted > 0 and lasted >= ENOUGH * len(wanted) and not self.soaking()
