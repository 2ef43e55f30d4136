"""A scheduler's own behaviour: nodes, jobs, runs of agents, and processes that die slowly.

Modelled on Nomad's dispatched children: a token names (device, epoch), and the same token gives the
same job as long as that job is listed, dead or alive. Only a purge makes the token free again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.errors import TransientError, UnpreparedError
from nomad_watchdog.ids import DeviceId, Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement, PlacementState, WallTime
from nomad_watchdog.schedulers import Capacity

FAILS: Final = "fails"
"""The variable of a spec whose agent exits 1 at once."""
_MAX_RESTART_DELAY_S: Final = 30.0


class News:
    """Notifies any number of listeners of changes. Each receives all pending changes together."""

    def __init__(self) -> None:
        self._ears: list[Ear] = []

    def tell(self, slugs: frozenset[Slug]) -> None:
        """Wake every listener."""
        for ear in self._ears:
            ear.hear(slugs)

    @contextmanager
    def ear(self) -> Iterator[Ear]:
        """Listen from now on."""
        one = Ear()
        self._ears.append(one)
        try:
            yield one
        finally:
            self._ears.remove(one)


class Ear:
    """The changes that one watcher has not received yet."""

    def __init__(self) -> None:
        self._slugs: frozenset[Slug] = frozenset()
        self._event = asyncio.Event()

    def hear(self, slugs: frozenset[Slug]) -> None:
        """Remember until `wait`."""
        self._slugs |= slugs
        self._event.set()

    async def wait(self) -> frozenset[Slug]:
        """All changes since the last call, at least one."""
        await self._event.wait()
        self._event.clear()
        slugs, self._slugs = self._slugs, frozenset()
        return slugs


@dataclass(slots=True, eq=False)
class Process:
    """One agent process."""

    pid: int
    slug: Slug
    device_id: DeviceId
    epoch: Epoch
    instance: str
    node: str
    spec: AgentSpec
    alive: bool = True
    term: bool = False
    """The process was asked to stop."""


@dataclass(slots=True, eq=False)
class Run:
    """One allocation: where the job is placed, and its process there."""

    instance: str
    node: str
    process: Process | None = None
    ended: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """One placement."""

    ref: str
    slug: Slug
    device_id: DeviceId
    epoch: Epoch
    spec: AgentSpec
    created_at: float
    owner: str
    stopped: bool = False
    run: Run | None = None
    restarts: int = 0
    reason: str = ""
    dead: bool = False


@dataclass(slots=True)
class Pace:
    """How long things take, seconds, each drawn from (minimum, maximum)."""

    place: tuple[float, float] = (0.0, 0.02)
    start: tuple[float, float] = (0.0, 0.02)
    die: tuple[float, float] = (0.0, 0.05)
    restart: tuple[float, float] = (0.02, 0.05)
    move: tuple[float, float] | None = None
    """None = agents of a lost node are not started elsewhere (`disconnect { replace = false }`)."""


@dataclass(slots=True)
class Cluster:
    """Nodes and jobs; every method is one step, and later steps come by timers."""

    pace: Pace = field(default_factory=Pace)
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    nodes: dict[str, bool] = field(default_factory=lambda: {"n1": True, "n2": True})
    """Name → whether the scheduler receives its reports."""
    closed: dict[str, bool] = field(default_factory=dict)
    """Nodes that take no new agents → whether they are being drained."""
    jobs: dict[str, Job] = field(default_factory=dict)
    processes: dict[int, Process] = field(default_factory=dict)
    """The live processes."""
    index: int = 1
    broken: bool = False
    """No listing can be read."""
    blocked: str = ""
    """Why there is no capacity; "" = there is."""
    parents: set[str] = field(default_factory=set)
    news: News = field(default_factory=News)
    on_start: Callable[[Job], None] = lambda _job: None
    on_process: Callable[[Process], None] = lambda _process: None
    _pids: int = 0
    _refs: int = 0

    # -- requests of clients --------------------------------------------------------------------

    def prepare(self, classes: Sequence[str]) -> None:
        self.parents.update(classes)

    def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec, owner: str) -> int:
        if spec.agent_class not in self.parents:
            raise UnpreparedError(f"there is no parent job for class {spec.agent_class!r}")
        for job in self.jobs.values():
            if job.slug == record.slug and job.epoch == epoch:
                return self.index
        self._refs += 1
        ref = f"{record.slug}/{int(epoch)}/{self._refs}"
        now = asyncio.get_running_loop().time()
        job = Job(ref, record.slug, record.device.id, epoch, spec, now, owner)
        self.on_start(job)
        self.jobs[ref] = job
        self._changed(job)
        self._later(self.pace.place, self._place, job)
        return self.index

    def retire(self, ref: str, grace_s: float) -> None:
        job = self.jobs.get(ref)
        if job is None or job.stopped or job.dead:
            return
        job.stopped = True
        self._changed(job)
        if job.run is None or job.run.process is None:
            if job.run is None or self.nodes[job.run.node]:
                self._end(job, "stopped before it ran")
        elif self.nodes[job.run.node]:
            self._terminate(job, job.run, grace_s)

    def listing(
        self, only: Collection[Slug] | None
    ) -> tuple[int, Mapping[Slug, tuple[Placement, ...]]]:
        if self.broken:
            raise TransientError("the cluster's listing can't be read")
        found: dict[Slug, tuple[Placement, ...]] = {}
        for job in self.jobs.values():
            if only is None or job.slug in only:
                found[job.slug] = (*found.get(job.slug, ()), self.shown(job))
        return self.index, found

    def shown(self, job: Job) -> Placement:
        """The job as a placement."""
        holds = job.run is not None and not job.dead
        return Placement(
            slug=job.slug,
            device_id=job.device_id,
            epoch=job.epoch,
            agent_class=job.spec.agent_class,
            spec_hash=job.spec.spec_hash,
            state=self.state(job),
            ref=job.ref,
            instances=(job.run.instance,) if holds and job.run is not None else (),
            node=job.run.node if job.run is not None else "",
            restarts=job.restarts,
            reason=job.reason,
            created_at=WallTime(job.created_at),
            queued=job.run is None,
        )

    def state(self, job: Job) -> PlacementState:
        """The state that the scheduler reports for a job."""
        if job.dead:
            return PlacementState.DEAD
        if job.run is None:
            return PlacementState.STOPPING if job.stopped else PlacementState.PENDING
        if not self.nodes[job.run.node]:
            return PlacementState.LOST
        if job.stopped:
            return PlacementState.STOPPING
        if job.run.process is not None:
            return PlacementState.RUNNING
        return PlacementState.RESTARTING if job.restarts else PlacementState.STARTING

    def capacity(self) -> Capacity:
        return Capacity(room=not self.blocked, reason=self.blocked)

    def sweep(self, refs: Sequence[str]) -> int:
        newest: dict[Slug, Epoch] = {}
        for job in self.jobs.values():
            newest[job.slug] = max(newest.get(job.slug, Epoch(0)), job.epoch)
        found = [self.jobs[ref] for ref in refs if ref in self.jobs]
        # The newest stays listed, so that a late request can't reuse its epoch.
        gone = [job for job in found if job.dead and job.epoch < newest[job.slug]]
        for job in gone:
            del self.jobs[job.ref]
            self._changed(job)
        return len(gone)

    # -- events in the cluster ------------------------------------------------------------------

    def lose(self, node: str, *, power: bool) -> None:
        """A node is no longer reachable; with `power` its processes are gone too."""
        self.nodes[node] = False
        for job in self._on(node):
            assert job.run is not None
            if power and job.run.process is not None:
                self._kill(job.run.process)
            self._changed(job)
            if self.pace.move is not None and not job.stopped:
                self._later(self.pace.move, self._move, job, job.run)
        if power:
            for process in [p for p in self.processes.values() if p.node == node]:
                self._kill(process)

    def find(self, node: str) -> None:
        """A lost node is back: jobs that were moved away or stopped meanwhile end there now."""
        self.nodes[node] = True
        kept = set()
        for job in self._on(node):
            run = job.run
            assert run is not None
            kept.add(run.instance)
            self._changed(job)
            if job.stopped:
                self._end_on_node(job, run)
            elif run.process is None or not run.process.alive:
                run.process = None
                job.restarts += 1
                self._later(self.pace.restart, self._start, job, run)
        for process in [p for p in self.processes.values() if p.node == node]:
            if process.instance not in kept:
                self._kill(process)

    def exit(self, process: Process, code: int) -> None:
        """A process exits: 0 is final, anything else is restarted in place."""
        if not process.alive:
            return
        self._kill(process)
        for job in self._on(process.node):
            if job.run is None or job.run.process is not process:
                continue
            if not self.nodes[process.node]:
                return  # unknown to the scheduler until the node is back
            job.run.process = None
            if job.stopped or code == 0:
                self._end(job, f"exit code {code}")
            else:
                self._restart(job, job.run, f"exit code {code}")

    def purge(self, ref: str) -> None:
        """An operator stops and purges a job manually; its process is stopped."""
        job = self.jobs.pop(ref)
        job.dead = True
        if job.run is not None and job.run.process is not None:
            self._kill(job.run.process)
        self._changed(job)

    def alive(self, slug: Slug) -> list[Process]:
        """The live processes of a device."""
        return [process for process in self.processes.values() if process.slug == slug]

    def is_calm(self, slugs: frozenset[Slug]) -> bool:
        """Whether all visible jobs of these slugs are as requested: none ended or is ending."""
        found = [job for job in self.jobs.values() if job.slug in slugs]
        return {job.slug for job in found} == slugs and not any(
            job.dead
            or job.stopped
            or job.restarts
            or (job.run is not None and not self.nodes[job.run.node])
            for job in found
        )

    # -- steps ----------------------------------------------------------------------------------

    def _on(self, node: str) -> list[Job]:
        return [
            job
            for job in self.jobs.values()
            if job.run is not None and not job.dead and job.run.node == node
        ]

    def _changed(self, job: Job) -> None:
        self.index += 1
        self.news.tell(frozenset({job.slug}))

    def _later(self, span: tuple[float, float], call: Callable[..., None], *args: object) -> None:
        asyncio.get_running_loop().call_later(self.chance.uniform(*span), call, *args)

    def _place(self, job: Job) -> None:
        if job.dead or job.stopped or job.run is not None:
            return
        up = [name for name, heard in self.nodes.items() if heard and name not in self.closed]
        if not up:
            self._later((0.5, 1.0), self._place, job)
            return
        free = [name for name in up if name not in job.spec.avoid]
        self._run_on(job, self.chance.choice(free or up))

    def _run_on(self, job: Job, node: str) -> None:
        job.run = Run(f"{self.chance.getrandbits(64):016x}", node)
        self._changed(job)
        self._later(self.pace.start, self._start, job, job.run)

    def _start(self, job: Job, run: Run) -> None:
        stale = job.run is not run or job.dead or job.stopped or run.process is not None
        if stale or not self.nodes[run.node]:
            return
        self._pids += 1
        process = Process(
            self._pids, job.slug, job.device_id, job.epoch, run.instance, run.node, job.spec
        )
        self.processes[process.pid] = run.process = process
        self._changed(job)
        self.on_process(process)
        if FAILS in job.spec.variables:
            asyncio.get_running_loop().call_soon(self.exit, process, 1)

    def _restart(self, job: Job, run: Run, reason: str) -> None:
        job.restarts += 1
        job.reason = reason
        self._changed(job)
        most = min(_MAX_RESTART_DELAY_S, self.pace.restart[1] * 2 ** min(job.restarts, 16))
        self._later((self.pace.restart[0], most), self._start, job, run)

    def _move(self, job: Job, run: Run) -> None:
        if job.dead or job.stopped or job.run is not run or self.nodes[run.node]:
            return
        up = [name for name, heard in self.nodes.items() if heard and name not in self.closed]
        if up:
            job.restarts += 1
            self._run_on(job, self.chance.choice(up))

    def _terminate(self, job: Job, run: Run, grace_s: float) -> None:
        assert run.process is not None
        run.process.term = True
        least, most = self.pace.die
        self._later((min(least, grace_s), min(most, grace_s)), self._end_on_node, job, run)

    def _end_on_node(self, job: Job, run: Run) -> None:
        if job.run is not run or not self.nodes[run.node]:
            return
        if run.process is not None:
            self._kill(run.process)
            run.process = None
        self._end(job, "stopped")

    def _end(self, job: Job, reason: str) -> None:
        if not job.dead:
            job.dead, job.reason = True, reason
            self._changed(job)

    def _kill(self, process: Process) -> None:
        process.alive = False
        self.processes.pop(process.pid, None)
