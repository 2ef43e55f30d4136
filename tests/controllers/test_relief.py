"""Relief in accelerated time: the real reconciler and controller over a simulated cluster, under injected pressure."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, TypeVar

import pytest

from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.host_usage import HostUsageController
from nomad_watchdog.controllers.relief import ReliefController
from nomad_watchdog.controllers.relief_state import FORMAT
from nomad_watchdog.core.acceptance import AcceptanceKind
from nomad_watchdog.core.host_load import PressureThresholds
from nomad_watchdog.core.relief import ReliefMove, ReliefRules, ReliefState, Rest
from nomad_watchdog.errors import TransientError
from nomad_watchdog.events.log import Event
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.host_pressure import HostPressure, HostUsage, Resource, Stall
from nomad_watchdog.ids import DeviceId, Shard, Slug, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentState, Device, Epoch, Limits, Report, WallTime
from nomad_watchdog.replicas.leases import FIRST, SoleOwner, Term
from tests.simulation.cluster import Job, Process
from tests.simulation.fakes import Cluster, FakeRegistry, FakeScheduler, Store
from tests.simulation.simulator import SPEC
from tests.simulation.virtual_time import VirtualClock, VirtualLoop

pytestmark = pytest.mark.slow_because("computes up to an hour of a fleet")
T = TypeVar("T")
RULES: Final = ReliefRules(
    {Resource.MEMORY: PressureThresholds(high=40.0, low=10.0)}, dry_run=False
)
BEAT_S: Final = 15.0
HOSTS: Final = ("n1", "n2", "n3")
DEVICES: Final = 12
WARM_UP_S: Final = 900.0
"""Longer than `min_age` and the start-up of the whole fleet."""

Injected = Callable[[str, int, float], float | None]
"""(host, its agents, seconds since the warm-up) → memory pressure in percent; None = it can't be read."""


class Even(Cluster):
    """Spreads the first agents evenly, and places later ones at random: a scheduler that knows nothing of the load."""

    def _place(self, job: Job) -> None:
        if job.epoch == 1:
            self._run_on(job, min(self.nodes, key=lambda name: (len(self._on(name)), name)))
        else:
            self._run_on(job, self.chance.choice(self._open_to(job)))

    def _open_to(self, _job: Job) -> list[str]:
        return list(self.nodes)


class Steered(Even):
    """Places no agent on the host that it should avoid."""

    def _open_to(self, job: Job) -> list[str]:
        return [name for name in self.nodes if name not in job.spec.avoid]


@dataclass
class Shares(SoleOwner):
    """The leases of one of several replicas, as the test gives them."""

    shards: int = 4
    held: frozenset[int] = frozenset()
    term: Term = FIRST

    def terms(self) -> Mapping[Shard, Term]:
        return dict.fromkeys(map(Shard, sorted(self.held)), self.term)


class Measured(FakeScheduler):
    """Has statistics of the hosts: the usage of their memory, as the hall injects it."""

    hall: Hall

    async def host_usage(self, hosts: Collection[str]) -> Mapping[str, HostUsage]:
        used = self.hall.used
        return (
            {}
            if used is None
            else {h: HostUsage(None, used(h, self.hall.agents(h))) for h in hosts}
        )


class Replica:
    """One control plane."""

    def __init__(self, hall: Hall, rules: ReliefRules | None, held: frozenset[int]) -> None:
        self.metrics = Metrics()
        self.leases = Shares(held=held)
        self.fleet = Fleet(FakeRegistry(hall.store), Limits(), hall.clock)
        scheduler, specs = Measured(hall.cluster), {SPEC.agent_class: SPEC}
        scheduler.hall = hall
        self.reconciler = Reconciler(self.fleet, scheduler, specs, self.metrics, self.leases)
        self.relief = ReliefController(
            self.fleet, self.reconciler.ownership, self.metrics, self.reconciler.wake
        )
        self.relief.configure(rules)
        self.usage = HostUsageController(self.fleet, scheduler, self.reconciler.ownership)
        self.reconciler.plan_builder.sources.append(self.relief.requested)
        self.reconciler.executor.avoids.append(self.relief.avoids)
        self.tasks: list[asyncio.Task[None]] = []
        self.up = True

    def kill(self) -> None:
        """It ends at once, and its memory is lost."""
        self.up = False
        for task in self.tasks:
            task.cancel()

    def take_over(self) -> None:
        """It gets all shards."""
        self.leases.held = frozenset(range(self.leases.shards))
        self.leases.term = Term(2, self.fleet.clock.monotonic())
        self.leases.changed.set()


class Hall:
    """Three hosts with agents that report the injected pressure when they are asked for it."""

    def __init__(
        self,
        injected: Injected,
        rules: ReliefRules | None = RULES,
        seed: int = 1,
        cluster: type[Even] = Even,
        replicas: int = 1,
        used: Callable[[str, int], float] | None = None,
    ) -> None:
        self.used = used
        self.injected = injected
        self.chance = random.Random(seed)
        self.cluster = cluster(chance=self.chance, nodes=dict.fromkeys(HOSTS, True))
        self.store = Store()
        self.store.initialise("test")
        self.clock = VirtualClock(asyncio.get_running_loop(), 0.0)
        shares = [frozenset(range(n, 4, replicas)) for n in range(replicas)]
        self.replicas = [Replica(self, rules, held) for held in shares]
        leader = self.replicas[0]
        self.fleet, self.relief, self.metrics = leader.fleet, leader.relief, leader.metrics
        self.state = AgentState.OK
        self.began = float("inf")
        self.most_unready = 0
        self.ended_with: dict[str, int] = {}
        """Host → its agents at the end."""
        self.events: list[Event] = []

    async def run(self, seconds: float) -> None:
        """Start the fleet, wait for the warm-up, and run for this time."""
        async with asyncio.TaskGroup() as self.group:
            self.cluster.on_process = self._born
            for one in self.replicas:
                await asyncio.sleep(0.1 + self.chance.random())  # replicas start at odd times
                one.tasks.append(self.group.create_task(one.reconciler.run()))
            await asyncio.sleep(5.0)  # so that no agent was created at 0, which stands for unknown
            names = (f"dev {number}" for number in range(DEVICES))
            devices = [Device(DeviceId(name), SPEC.agent_class, "127.0.0.1") for name in names]
            await self.fleet.records.register(devices)
            await asyncio.sleep(WARM_UP_S)
            self.began = self._time()
            for one in self.replicas:
                one.tasks.append(self.group.create_task(one.relief.run()))
                one.tasks.append(self.group.create_task(one.usage.run()))
            look = self.group.create_task(self._look())
            await asyncio.sleep(seconds)
            self.ended_with = {host: self.agents(host) for host in HOSTS}
            look.cancel()
            for one in self.replicas:
                one.kill()
            for process in self.cluster.processes.values():
                process.alive = False
        self.events = [event for one in self.replicas for event in one.fleet.events.all.recent()]

    def _time(self) -> float:
        return asyncio.get_running_loop().time()

    def agents(self, host: str) -> int:
        return sum(one.alive and one.node == host for one in self.cluster.processes.values())

    def _born(self, process: Process) -> None:
        self.group.create_task(self._agent(process))

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            up = [one for one in self.replicas if one.up]
            self.most_unready = max(self.most_unready, up[-1].fleet.agents.unready())

    async def _agent(self, process: Process) -> None:
        sequence = 0
        await asyncio.sleep(self.chance.uniform(0.1, 3.0))
        while process.alive:
            sequence += 1
            up = [one for one in self.replicas if one.up]
            called = self.chance.choice(up)
            asked = called.fleet.pressures.asks(process.slug)
            report = Report(
                process.device_id, process.slug, process.epoch, process.instance, sequence,
                ready=True, state=self.state, was_ready=True, misses=0, confirmed=False,
                reason="", listen="", version="1",
                pressure=self._pressure(process.node) if asked else None,
            )  # fmt: skip
            answer = await called.fleet.reports.receive(report)
            for other in up if answer.kind is AcceptanceKind.ACCEPTED else ():
                if other is not called:
                    other.fleet.reports.accept_replicated(report)
            if answer.kind is AcceptanceKind.REFUSED:
                self.cluster.exit(process, 0)
                return
            await asyncio.sleep(BEAT_S * self.chance.uniform(0.9, 1.1))

    def _pressure(self, host: str) -> HostPressure:
        value = self.injected(host, self.agents(host), max(0.0, self._time() - self.began))
        if value is None:
            return HostPressure(unreadable="not here")
        return HostPressure(Stall(0, 0), Stall(value, value), Stall(0, 0))

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def played(injected: Injected, seconds: float, **options: Any) -> Hall:
    """A hall after this virtual time."""

    async def play() -> Hall:
        hall = Hall(injected, **options)
        await hall.run(seconds)
        return hall

    return in_virtual_time(play())


def in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def loaded_by_agents(host: str, agents: int, _now: float) -> float:
    """Each agent on n1 costs 15 %: with two or fewer it is below the high threshold."""
    return 15.0 * agents if host == "n1" else 2.0


@pytest.mark.parametrize("seed", range(2))
def test_an_overloaded_host_is_relieved_within_its_budgets(seed: int) -> None:
    """The host falls below its threshold, with at most one device at a time without a ready agent, and after that
    nothing moves any more. Between two moves the host rests. No device that has arrived elsewhere is moved again."""
    hall = played(loaded_by_agents, 3000.0, seed=seed)
    assert hall.ended_with["n1"] == 2
    assert hall.most_unready == 1
    moved = hall.of("relief.moved")
    returned = hall.of("relief.returned")
    assert len(moved) == 2 + len(returned)
    assert {event.data["node"] for event in moved} == {"n1"}
    again = Counter(event.slug for event in moved) - Counter(event.slug for event in returned)
    assert max(again.values()) == 1
    for one, following in pairwise(moved):
        assert following.at - one.at >= RULES.cooldown_s
    assert sum(hall.ended_with.values()) == DEVICES


@pytest.mark.parametrize("seed", [2, 5])
def test_there_is_no_ping_pong(seed: int) -> None:
    """If the load follows the agents, so that relieving a host can overload another one, which is then relieved, no agent
    goes back and forth: within 30 minutes no device that has arrived elsewhere leaves the same host again."""
    most = {"n1": 1, "n2": 4, "n3": 12}
    hall = played(
        lambda host, agents, _now: 60.0 if agents > most[host] else 5.0, 1800.0, seed=seed,
        cluster=Steered,
    )  # fmt: skip
    left = Counter((event.slug, event.data["node"]) for event in hall.of("relief.moved"))
    assert len(left) >= 2
    assert max(left.values()) == 1
    assert hall.most_unready == 1


def test_a_scheduler_that_can_avoid_a_host_places_no_agent_there_again() -> None:
    """Each start within the device's rest names the host that it has left, so a scheduler that obeys relieves the host
    with one move per agent."""
    hall = played(loaded_by_agents, 900.0, seed=7, cluster=Steered)
    assert hall.ended_with["n1"] == 2
    assert not hall.of("relief.returned")
    assert len(hall.of("relief.moved")) == 2
    assert {job.spec.avoid for job in hall.cluster.jobs.values() if job.epoch > 1} == {("n1",)}
    assert {job.spec.avoid for job in hall.cluster.jobs.values() if job.epoch == 1} == {()}


def test_a_host_that_never_calms_down_is_relieved_less_and_less_often() -> None:
    """If moves do not help, each rest is twice as long as the one before; each failure is reported."""
    rules = replace(RULES, cooldown_s=60.0)
    hall = played(lambda host, _n, _now: 90.0 if host == "n1" else 1.0, 3000.0, rules=rules)
    moved = hall.of("relief.moved")
    gaps = [following.at - one.at for one, following in pairwise(moved)]
    assert 3 <= len(gaps) <= 5
    for number, gap in enumerate(gaps):
        assert gap >= rules.cooldown_s * 2 ** (number + 1)
    published = len(hall.of("relief.not_helped")) + len(hall.of("relief.returned"))
    assert published >= len(gaps)
    assert hall.most_unready == 1


def test_nothing_moves_while_all_hosts_are_loaded_and_that_is_reported_once() -> None:
    """While no host is calm nothing moves. One event reports that it begins, and one that it ends; then agents move."""
    hall = played(lambda host, _n, now: 90.0 if now < 900 or host == "n1" else 1.0, 1500.0)
    (began,), (ended,) = hall.of("relief.no_calm_host"), hall.of("relief.calm_host")
    moved = hall.of("relief.moved")
    assert began.at < ended.at <= moved[0].at
    assert "no other host is calm" in began.text
    assert moved[0].at > WARM_UP_S + 900
    assert b"nomad_watchdog_relief_impossible 0.0" in hall.metrics.render()


def test_a_host_without_fresh_readings_is_left_alone() -> None:
    """If the pressure of the overloaded host cannot be read, or the agents of the calm ones do not read it, nothing
    moves."""
    hall = played(lambda host, _n, _now: None if host == "n1" else 1.0, 600.0)
    assert not hall.of("relief.moved")
    hall = played(lambda host, _n, _now: 90.0 if host == "n1" else None, 600.0)
    assert not hall.of("relief.moved")
    assert len(hall.of("relief.no_calm_host")) == 1
    assert b"nomad_watchdog_relief_impossible 1.0" in hall.metrics.render()


def test_a_host_without_pressure_is_relieved_by_its_usage() -> None:
    """Where no pressure can be read, the scheduler's statistics and their own thresholds decide; without such thresholds
    nothing moves."""

    def used(host: str, agents: int) -> float:
        return 20.0 * agents if host == "n1" else 5.0

    usage = {Resource.MEMORY: PressureThresholds(high=70.0, low=30.0)}
    rules = replace(RULES, usage=usage)
    hall = played(lambda *_: None, 1500.0, rules=rules, used=used, cluster=Steered)
    assert hall.ended_with["n1"] == 3
    (moved,) = hall.of("relief.moved")
    assert "memory usage 80 % (high: 70 %)" in moved.text
    rows = {one.name: one for one in hall.fleet.hosts.rows()}
    assert (rows["n1"].usage, rows["n1"].pressure) == (HostUsage(None, 60.0), None)
    assert ("n1", Resource.MEMORY, 0.6) in list(hall.fleet.hosts.usages())
    assert not played(lambda *_: None, 600.0, used=used).of("relief.moved")


def test_a_dry_run_moves_and_stores_nothing() -> None:
    """A dry run reports what it would move, ever less often, and neither moves an agent nor writes to the registry."""
    hall = played(
        lambda host, _n, _now: 90.0 if host == "n1" else 1.0, 3600.0,
        rules=replace(RULES, dry_run=True),
    )  # fmt: skip
    would = hall.of("relief.would_move")
    assert 2 <= len(would) <= 5
    assert hall.store.document("relief").index == 0
    assert not hall.of("relief.moved")
    assert all(job.epoch == 1 for job in hall.cluster.jobs.values())
    assert b'relief_moves_total{outcome="would_move"} ' + str(float(len(would))).encode() in (
        hall.metrics.render()
    )


def test_relief_is_off_by_default_and_spares_young_agents_and_unhealthy_devices() -> None:
    """Without rules, with agents that are younger than the minimum age, or with devices that are not well, no agent
    moves."""
    hot: Injected = lambda host, _n, _now: 90.0 if host == "n1" else 1.0  # noqa: E731
    assert not played(hot, 600.0, rules=None).of("relief.moved")
    young = replace(RULES, min_age_s=10 * WARM_UP_S)
    assert not played(hot, 600.0, rules=young).of("relief.moved")

    async def suspect() -> Hall:
        hall = Hall(hot)
        hall.state = AgentState.DEGRADED
        await hall.run(600.0)
        return hall

    assert not in_virtual_time(suspect()).of("relief.moved")


def test_a_device_that_becomes_unhealthy_after_the_decision_stays() -> None:
    """A stored move is requested from the planner only while the device is healthy. One of a device that this replica
    does not know, because it has left or the records were not read yet, is not requested."""

    async def play() -> tuple[bool, bool]:
        hall = Hall(lambda host, _n, _now: 90.0 if host == "n1" else 1.0)
        task = asyncio.ensure_future(hall.run(1.0))
        await asyncio.sleep(WARM_UP_S - 100)
        slug = next(iter(hall.fleet.records))
        move = ReliefMove(slug, Epoch(1), "ref", "n1", "why", WallTime(0.0))
        unknown = replace(move, slug=slug_of(DeviceId("unknown")))
        await hall.relief._document.update(lambda _state: ReliefState((move, unknown)))
        assert unknown.slug not in hall.relief.requested()
        before = slug in hall.relief.requested()
        hall.state = AgentState.DEGRADED
        await asyncio.sleep(60.0)
        after = slug in hall.relief.requested()
        await task
        return before, after

    assert in_virtual_time(play()) == (True, False)


def test_a_new_leader_continues_what_another_one_began() -> None:
    """A controller that begins with the stored state of another one keeps to its limits: the host rests, and the move
    in progress takes the only place."""

    async def play() -> list[Event]:
        hall = Hall(lambda host, _n, _now: 90.0 if host == "n1" else 1.0)
        rest = Rest(WallTime(WARM_UP_S + 4000), 4)
        stored = ReliefState((), {"n1": rest})
        await hall.relief._document.update(lambda _state: stored)
        await hall.run(900.0)
        return hall.of("relief.moved")

    assert in_virtual_time(play()) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_leader_that_is_killed_in_a_move_leaves_it_to_the_next_one(seed: int) -> None:
    """Of two replicas with half of the devices each, the leader is killed as soon as the first move is stored. The other
    one finishes this move and goes on: never is more than one device without a ready agent, each device that moves does
    so once, and the host ends below its threshold."""

    async def play() -> Hall:
        hall = Hall(loaded_by_agents, seed=seed, cluster=Steered, replicas=2)
        task = asyncio.ensure_future(hall.run(1200.0))
        while not hall.store.document("relief").index:
            await asyncio.sleep(0.01 + seed / 4)
        leader, other = hall.replicas
        leader.kill()
        await asyncio.sleep(8.0)
        other.take_over()
        await task
        return hall

    hall = in_virtual_time(play())
    assert hall.ended_with["n1"] == 2
    assert hall.most_unready <= 1
    epochs = Counter(job.epoch for job in hall.cluster.jobs.values() if not job.dead)
    assert epochs == {1: DEVICES - 2, 2: 2}
    state = FORMAT.decode(hall.store.document("relief").body)
    assert state.moves == ()


def test_two_replicas_move_the_devices_of_their_own_shards() -> None:
    """One replica decides; each moves its own devices, at most one at a time in the whole fleet."""
    hot: Injected = lambda host, agents, _now: 90.0 if host == "n1" and agents else 1.0  # noqa: E731
    rules = replace(RULES, cooldown_s=60.0, looks=1)
    hall = played(hot, 2400.0, rules=rules, cluster=Steered, replicas=2)
    assert hall.most_unready == 1
    leader, other = ({event.slug for event in one.fleet.events.all.recent()
                      if event.kind == "plan.replace"} for one in hall.replicas)  # fmt: skip
    moved = {
        event.slug
        for event in hall.replicas[0].fleet.events.all.recent()
        if event.kind == "relief.moved"
    }
    assert leader | other == moved
    assert leader
    assert other
    assert not leader & other
    assert not [
        event
        for event in hall.replicas[1].fleet.events.all.recent()
        if event.kind.startswith("relief.")
    ]


def test_a_registry_that_fails_moves_nothing_and_is_reported() -> None:
    """While the document cannot be read nothing is decided; the status states why, and later it goes on."""

    async def play() -> tuple[object, object, bool]:
        hall = Hall(lambda host, _n, _now: 90.0 if host == "n1" else 1.0)
        fails = True
        read = hall.store.document

        def document(name: str) -> Any:
            if fails and name == "relief":
                raise TransientError("no answer")
            return read(name)

        hall.store.document = document  # type: ignore[method-assign]
        task = asyncio.ensure_future(hall.run(1200.0))
        await asyncio.sleep(WARM_UP_S + 300)
        broken = hall.fleet.views.status()["relief"]
        none = not hall.fleet.events.all.recent() or not any(
            event.kind == "relief.moved" for event in hall.fleet.events.all.recent()
        )
        fails = False
        await task
        assert hall.of("relief.moved")
        with suppress(asyncio.CancelledError):
            await task
        return broken, hall.fleet.views.status()["relief"], none

    broken, later, none = in_virtual_time(play())
    assert isinstance(broken, dict)
    assert isinstance(later, dict)
    assert broken["problem"] == "no answer"
    assert "problem" not in later
    assert later["overloaded"] in (["n1"], [])
    assert none


def test_the_document_is_read_as_it_was_written() -> None:
    """The stored state is read back unchanged."""
    move = ReliefMove(Slug("a"), Epoch(3), "ref", "n1", "why", WallTime(1.5), WallTime(2.5))
    rests = {slug_of(DeviceId("a")): Rest(WallTime(9.0), 2, judged=False, host="n1")}
    state = ReliefState((move,), {"n1": Rest(WallTime(3.0))}, rests)
    assert FORMAT.decode(FORMAT.encode(state)) == state
    assert FORMAT.decode(b'{"v": 1, "moves": 7}') == ReliefState()
