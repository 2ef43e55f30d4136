"""Agent pools: workers that are not one a device, but as many as a metric asks for.

A driver says how a scheduler keeps a pool; `keeper` joins it with the decider (`core.pool_scaling`). How many
workers there should be is kept by the scheduler itself, so that it outlives us and is no copy of anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from nomad_watchdog.config.pools import PoolSettings


@dataclass(frozen=True, slots=True)
class View:
    """A pool as its scheduler sees it."""

    count: int
    """So many workers are asked for."""
    running: int
    worker_hash: str = ""
    """What the workers were last told to be (`PoolSettings.worker_hash`)."""
    workers: tuple[str, ...] = ()
    """The names of those that run; empty where the scheduler tells only how many."""
    trouble: str = ""
    """Why fewer run than are asked for, if the scheduler says so."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The average of the running workers, as a share in percent of what one was given."""

    cpu: float
    memory: float


def average(shares: Sequence[tuple[float, float]], running: int) -> Usage | None:
    """Of (cpu, memory) of the workers that could be measured; None unless that is all that run."""
    if not running or len(shares) < running:
        return None
    cpu, memory = map(fmean, zip(*shares, strict=True))
    return Usage(cpu, memory)


class Driver(Protocol):
    """Raises WatchdogError where the scheduler can't be asked, UserError for what it refuses."""

    async def look(self) -> Mapping[str, View]:
        """All pools of this installation, also those that the configuration no longer names."""
        ...

    async def view(self, name: str) -> View | None:
        """One pool of this installation; None when there is none."""
        ...

    async def ensure(self, name: str, pool: PoolSettings) -> None:
        """Make the pool exist as configured. The number of workers is kept, but within the bounds; a new
        pool has the least number. Idempotent."""
        ...

    async def scale(self, name: str, count: int, reason: str) -> None:
        """Ask for so many workers. Raises NotFoundError for a pool that is not there, ConflictError while
        its workers are being replaced."""
        ...

    async def remove(self, name: str) -> None:
        """Stop the workers and forget the pool. Idempotent."""
        ...

    async def usage(self, name: str, pool: PoolSettings) -> Usage | None:
        """None when there is no worker, or one that runs can't be measured (yet)."""
        ...

    async def run(self, ours: Callable[[], bool]) -> None:
        """Do until cancelled what a scheduler would do by itself, while `ours()`."""
        ...

    async def close(self) -> None:
        """Release connections; workers run on."""
        ...
