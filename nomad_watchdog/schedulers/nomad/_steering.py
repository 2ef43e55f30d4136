"""Which nodes Nomad prefers for a start (`AgentSpec.avoid`), and which nodes take agents at all.

An affinity against a node makes its score negative, while the score of every other node is positive. So Nomad chooses
such a node only if no other one with room is among those that it considers: up to 100, chosen at random
(https://developer.hashicorp.com/nomad/docs/job-specification/affinity).
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Final

from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.clients.nomad_rows import Job, JobAffinity, NodeRow, TaskGroup
from nomad_watchdog.clock import Clock
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.model import Monotonic
from nomad_watchdog.schedulers.nomad.nodes import node_of

log = logging.getLogger(__name__)

KEEP_S: Final = 60.0
"""A parent keeps its affinity for this time after the last start that asked for it."""
_NAME: Final = "${node.unique.name}"
_OPERAND: Final = "set_contains_any"
_WEIGHT: Final = -100


def steered(job: Job, avoid: Collection[str]) -> Job:
    """The job with an affinity against these nodes; the job itself if there are none."""
    if not avoid:
        return job
    own: JobAffinity = {
        "LTarget": _NAME,
        "RTarget": ",".join(avoid),
        "Operand": _OPERAND,
        "Weight": _WEIGHT,
    }
    return {**job, "Affinities": [*(job.get("Affinities") or []), own]}


def steered_service(job: Job, avoid: Collection[str]) -> Job:
    """As `steered`, for the job of one device, which is updated in place. With a sticky disk Nomad would choose the node of
    the earlier allocation, whatever its score."""
    if not avoid:
        return job
    groups: list[TaskGroup] = [
        {**group, "EphemeralDisk": {**(group.get("EphemeralDisk") or {}), "Sticky": False}}
        for group in job.get("TaskGroups") or []
    ]
    return steered({**job, "TaskGroups": groups}, avoid)


def is_steered(found: Job, job: Job) -> bool:
    """Whether a registered job has affinities that the job from the template does not have."""
    return len(found.get("Affinities") or []) != len(job.get("Affinities") or [])


class ParentSteering:
    """The affinities of the parent jobs. A dispatched job has those of its parent at that moment, and a dispatch itself
    can't have any. So the parent is registered again, which changes none of its earlier children."""

    def __init__(self, client: NomadClient, clock: Clock) -> None:
        self._client = client
        self._clock = clock
        self._avoided: dict[str, tuple[str, ...]] = {}
        """Parent → the nodes that its affinity names."""
        self._asked_at: dict[str, Monotonic] = {}
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def forget(self) -> None:
        """The parents were registered without affinities."""
        self._avoided.clear()

    async def steer(self, parent: str, job: Job | None, avoid: tuple[str, ...]) -> None:
        """Have the next children of this parent avoid these nodes. `job`: the parent as built from its template; None =
        not known, and nothing is done.

        Never raises: an agent on a node with many others is better than no agent."""
        now = self._clock.monotonic()
        if avoid:
            self._asked_at[parent] = now
        if job is None or not self._is_due(parent, avoid, now):
            return
        async with self._locks[parent]:
            if not self._is_due(parent, avoid, now):
                return
            try:
                await self._client.register(steered({**job, "ID": parent, "Name": parent}, avoid))
            except WatchdogError as error:
                log.warning("nodes not avoided", extra={"job": parent, "reason": str(error)})
                return
            self._avoided[parent] = avoid

    def _is_due(self, parent: str, avoid: tuple[str, ...], now: Monotonic) -> bool:
        if self._avoided.get(parent, ()) == avoid:
            return False
        return bool(avoid) or now - self._asked_at[parent] > KEEP_S


def takers(rows: Iterable[NodeRow], jobs: Collection[Job]) -> frozenset[str]:
    """The names of the nodes that can take agents of at least one of these jobs, by their node pool, datacenter and
    drivers. Constraints of a template are not evaluated. Without jobs every open node counts."""
    return frozenset(
        row.get("Name", "")
        for row in rows
        if node_of(row).takes_agents and (not jobs or any(_takes(row, job) for job in jobs))
    )


def _takes(row: NodeRow, job: Job) -> bool:
    pool = job.get("NodePool") or "default"
    places = job.get("Datacenters") or ["*"]
    healthy = {name for name, one in (row.get("Drivers") or {}).items() if one.get("Healthy")}
    tasks = [task for group in job.get("TaskGroups") or [] for task in group.get("Tasks") or []]
    return (
        pool in ("all", row.get("NodePool") or "default")
        and any(fnmatchcase(row.get("Datacenter", ""), one) for one in places)
        and all(task.get("Driver", "") in healthy for task in tasks)
    )
