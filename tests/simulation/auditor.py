"""Checks the promises while a simulation runs: from the stores, never from the control plane's own
reports."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.core.actions import ActionKind
from nomad_watchdog.core.planner import Plan, stop_key
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Epoch, Limits, PlacementState, Presence
from tests.simulation.cluster import Cluster, Job, Process
from tests.simulation.fakes import Store
from tests.simulation.faults import SLOWEST_S

SETTLED_S: Final = 2 * SLOWEST_S
"""An older request is known to every replica that has a call in transit."""
STALE_S: Final = 60.0
"""S1: maximum age of the registry view that a report may be judged by."""


class BrokenPromiseError(AssertionError):
    """A promise did not hold; the message begins with its number."""


@dataclass(slots=True)
class Bound:
    """The time during which an instance was the accepted one."""

    epoch: Epoch
    instance: str
    until: float | None = None


@dataclass(slots=True)
class Trace:
    """What happened, as a digest and its last lines."""

    lines: deque[str] = field(default_factory=lambda: deque(maxlen=5000))
    count: int = 0
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def say(self, text: str) -> None:
        """Add a line with the virtual time."""
        line = f"{asyncio.get_running_loop().time():10.4f}  {text}"
        self.lines.append(line)
        self.count += 1
        self._digest.update(line.encode())

    @property
    def digest(self) -> str:
        """Equal digests: everything happened in the same order at the same times."""
        return self._digest.hexdigest()[:16]


class Auditor:
    """Checks every write and every start, and keeps what did not hold."""

    def __init__(self, store: Store, cluster: Cluster, limits: Limits) -> None:
        self.store = store
        self.cluster = cluster
        self.limits = limits
        self.trace = Trace()
        self.wrong: list[str] = []
        self.actions = 0
        """Number of writes, starts and stops so far."""
        self._bound: dict[Slug, list[Bound]] = {}
        self._wished_at: dict[Slug, float] = {}
        self._purged_at: dict[Slug, float] = {}
        store.on_write = self._written
        cluster.on_start = self._started
        self._names: Callable[[Slug], str] = lambda slug: slug[:12]

    def broken(self, promise: str, text: str) -> None:
        """Record a broken promise."""
        self.trace.say(f"BROKEN {promise}: {text}")
        self.wrong.append(f"{promise}: {text}")

    def now(self) -> float:
        """Virtual time."""
        return asyncio.get_running_loop().time()

    # -- the registry ---------------------------------------------------------------------------

    def _written(self, before: DeviceRecord | None, after: DeviceRecord) -> None:
        self.actions += 1
        name = after.device.id
        self.trace.say(
            f"registry: {name} is {after.presence.value}, generation {after.generation}, "
            f"epoch {after.epoch}, instance {after.instance[:6] or '-'}"
        )
        if before is None or before.generation != after.generation:
            self._wished_at[after.slug] = self.now()
        if before is not None:
            self._check_write(before, after)
        if before is None or (before.epoch, before.instance) != (after.epoch, after.instance):
            bounds = self._bound.setdefault(after.slug, [])
            if bounds and bounds[-1].until is None:
                bounds[-1].until = self.now()
            if after.instance:
                bounds.append(Bound(after.epoch, after.instance))

    def _check_write(self, before: DeviceRecord, after: DeviceRecord) -> None:
        name = after.device.id
        if after.epoch < before.epoch:
            self.broken("S1", f"epoch of {name} went from {before.epoch} to {after.epoch}")
        if after.generation not in (before.generation, before.generation + 1):
            self.broken("S5", f"{name}: generation {before.generation} to {after.generation}")
        if after.generation == before.generation and after.presence is not before.presence:
            self.broken("S4", f"{name} became {after.presence.value} without anybody's wish")
        rebound = before.instance and after.epoch == before.epoch
        if rebound and after.instance != before.instance:
            listed = self._instances(after.slug)
            if before.instance in listed:
                self.broken("S1", f"{name}: {before.instance[:6]} was replaced while it may live")

    def _instances(self, slug: Slug) -> set[str]:
        _, found = self.cluster.listing(frozenset({slug}))
        return {instance for placement in found.get(slug, ()) for instance in placement.instances}

    # -- the scheduler --------------------------------------------------------------------------

    def purged(self, job: Job) -> None:
        """An operator purged a job manually, and with it the scheduler's memory of its token: a
        request still on the wire may start that epoch again (docs/limits.md). It is never accepted
        (S1)."""
        self.trace.say(f"an operator purges {job.device_id}, epoch {job.epoch}")
        self._purged_at[job.slug] = self.now()

    def _started(self, job: Job) -> None:
        self.actions += 1
        record = self.store.record(job.slug)
        self.trace.say(f"scheduler: {job.owner} places {job.device_id} at epoch {job.epoch}")
        if record is None or record.epoch < job.epoch:
            self.broken("S2", f"{job.device_id} starts at {job.epoch} before it was committed")
        if self.now() - self._purged_at.get(job.slug, -SETTLED_S) < SETTLED_S:
            return
        if record is not None and record.epoch > job.epoch:
            self.broken("S2", f"{job.device_id} starts at {job.epoch}, after {record.epoch}")
        for other in self.cluster.jobs.values():
            if other.slug == job.slug and self.cluster.state(other) is not PlacementState.DEAD:
                state = self.cluster.state(other)
                self.broken("S3", f"{job.device_id} starts beside epoch {other.epoch} ({state})")

    def process_began(self, process: Process) -> None:
        """A process starts; no other one that the scheduler still sees may run beside it (S3)."""
        self.trace.say(f"process {process.pid} of {process.device_id}, epoch {process.epoch}")
        purged = self.now() - self._purged_at.get(process.slug, -2 * SETTLED_S) < 2 * SETTLED_S
        for other in [] if purged else self.cluster.alive(process.slug):
            if other is not process and self.cluster.nodes[other.node]:
                self.broken("S3", f"{process.device_id}: pid {other.pid} beside {process.pid}")

    def stopped(self, who: str, ref: str) -> None:
        """A stop reaches the scheduler: it must not hit the agent of a device whose request to be
        watched is old (S7)."""
        job = self.cluster.jobs.get(ref)
        if job is None or job.stopped or job.dead:
            return
        self.actions += 1
        self.trace.say(f"scheduler: {who} stops {job.device_id} at epoch {job.epoch}")
        record = self.store.record(job.slug)
        wanted = record is not None and record.presence is Presence.PRESENT
        quiet_s = self.now() - self._wished_at.get(job.slug, 0.0)
        if wanted and record is not None and record.epoch == job.epoch and quiet_s > SETTLED_S:
            self.broken("S7", f"{job.device_id} is wanted for {quiet_s:.0f} s and was stopped")

    # -- what replicas decide -------------------------------------------------------------------

    def planned(
        self, who: str, plan: Plan, confirmed: frozenset[tuple[Slug, Epoch, str]], seen: int
    ) -> None:
        """Check a pass's plan: no more stops than the limit allows, except for confirmed ones.
        `seen`: the live agents in the replica's view."""
        fresh = [
            action
            for action in plan.actions
            if action.kind is ActionKind.RETIRE and stop_key(action) not in confirmed
        ]
        live = sum(not job.dead for job in self.cluster.jobs.values())
        # The replica counts what it sees; the cluster may have fewer by now, because a whole node
        # may be lost.
        most = max(self.limits.breaker_min, int(seen * self.limits.breaker_fraction))
        if len(fresh) > most:
            self.broken("S7", f"{who} stops {len(fresh)} of {live} in one pass")

    def accepted(self, process: Process, asked_at: float) -> None:
        """A report was accepted: its instance must have been the bound one within the last
        STALE_S."""
        last: float | None = None
        for bound in self._bound.get(process.slug, ()):
            if (bound.epoch, bound.instance) == (process.epoch, process.instance):
                last = self.now() if bound.until is None else bound.until
        what = f"{process.device_id}, epoch {process.epoch}, {process.instance[:6]}"
        if last is None:
            self.broken("S1", f"{what} was accepted and never bound")
        elif asked_at - last > STALE_S:
            self.broken("S1", f"{what} was accepted {asked_at - last:.1f} s after its time")

    def _runs(self, slug: Slug, epoch: Epoch, spec_hash: str) -> bool:
        return any(
            (job.slug, job.epoch, job.spec.spec_hash) == (slug, epoch, spec_hash)
            for job in self.cluster.jobs.values()
        )

    # -- at the end -----------------------------------------------------------------------------

    def unsettled(self, wanted: dict[Slug, bool], spec_hash: str) -> list[str]:
        """What is missing for L1: exactly one accepted agent per wanted device, none for any
        other."""
        missing = []
        for slug, present in wanted.items():
            record = self.store.record(slug)
            alive = self.cluster.alive(slug)
            name = record.device.id if record is not None else slug
            # The record of a device that has left may be deleted.
            if (record is not None and record.presence is Presence.PRESENT) is not present:
                missing.append(f"S4: {name} should be {'present' if present else 'absent'}")
            elif len(alive) != int(present):
                states = [
                    f"{job.epoch} {self.cluster.state(job)}"
                    for job in self.cluster.jobs.values()
                    if job.slug == slug
                ]
                missing.append(f"L1: {name} has {len(alive)} agents; placements: {states}")
            elif record is None or not present:
                continue
            elif (alive[0].epoch, alive[0].instance) != (record.epoch, record.instance):
                missing.append(f"L1: the agent of {name} is not the accepted one")
            elif not self._runs(slug, record.epoch, spec_hash):
                missing.append(f"L1: the agent of {name} has the old version")
        return missing
