"""Worker pools: workers that are not tied to a device; a metric determines their number.

A driver manages the pools of one scheduler; `controller` connects it with `core.pool_scaling`. The number of
workers is stored only by the scheduler, so it survives the control plane.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from nomad_watchdog.config.pools import PoolSettings


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The state of a pool in its scheduler."""

    count: int
    """Desired number of workers."""
    running: int
    worker_hash: str = ""
    """Hash of the workers' configuration (`PoolSettings.worker_hash`)."""
    workers: tuple[str, ...] = ()
    """Names of the running workers; empty if the scheduler reports only their number."""
    problem: str = ""
    """Why fewer workers run than desired, if the scheduler reports it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Average over the running workers, in percent of a worker's share."""

    cpu: float
    memory: float


def average(shares: Sequence[tuple[float, float]], running: int) -> Usage | None:
    """The average of (cpu, memory) of the measured workers; None unless all running workers were measured."""
    if not running or len(shares) < running:
        return None
    cpu, memory = map(fmean, zip(*shares, strict=True))
    return Usage(cpu, memory)


class Driver(Protocol):
    """Methods raise WatchdogError when the scheduler cannot be reached, UserError when it rejects something."""

    async def list_pools(self) -> Mapping[str, PoolStatus]:
        """All pools of this installation, including those that are no longer configured."""
        ...

    async def status(self, name: str) -> PoolStatus | None:
        """One pool of this installation; None when it does not exist."""
        ...

    async def ensure(self, name: str, pool: PoolSettings) -> None:
        """Create or update the pool as configured. The number of workers stays, within the bounds; a new pool
        starts with the minimum. Idempotent."""
        ...

    async def scale(self, name: str, count: int, reason: str) -> None:
        """Set the number of workers. Raises NotFoundError for a pool that does not exist, ConflictError while its
        workers are being replaced."""
        ...

    async def remove(self, name: str) -> None:
        """Stop the workers and delete the pool. Idempotent."""
        ...

    async def usage(self, name: str, pool: PoolSettings) -> Usage | None:
        """None when there is no worker, or a running one cannot be measured (yet)."""
        ...

    async def run(self, is_leader: Callable[[], bool]) -> None:
        """Until cancelled: do what a scheduler does by itself, while `is_leader()`."""
        ...

    async def close(self) -> None:
        """Release connections. Workers keep running."""
        ...
