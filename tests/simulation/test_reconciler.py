"""Behaviour of the reconciler that depends on a clock, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.agents.record_informer import DOUBT_EVERY_S
from nomad_watchdog.core.pauses import Pause, Target
from nomad_watchdog.errors import (
    TerminalError,
    TransientError,
    UnpreparedError,
    WatchdogError,
)
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, Shard, Slug, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import (
    AgentState,
    Departure,
    Device,
    Limits,
    Monotonic,
    PlacementState,
    PresenceRules,
    Report,
    WallTime,
)
from nomad_watchdog.replicas.leases import Replica, SoleOwner, Term
from nomad_watchdog.schedulers import Capacity
from tests.simulation.fakes import Cluster, FakeRegistry, FakeScheduler, Line, Store
from tests.simulation.simulator import SPEC
from tests.simulation.virtual_time import VirtualClock, VirtualLoop

T = TypeVar("T")
ONE = DeviceId("one")


class CutShort(Line):
    """While armed, each answer of the registry's watch omits every record."""

    armed = False

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        answer: Any = await super().call(what, effect)
        if what == "registry.watch" and self.armed:
            return (answer[0], [])  # type: ignore[return-value]  # a listing, as `what` says
        return answer  # type: ignore[no-any-return]


class Refusing(Line):
    """The scheduler starts nothing, so that no agent without a record causes another read of the
    records."""

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if what == "scheduler.ensure":
            raise TransientError("no")
        return await super().call(what, effect)


class Slow(Line):
    """A full list of the scheduler takes three seconds to arrive; counts the stops."""

    def __init__(self) -> None:
        super().__init__()
        self.stops = 0

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        self.stops += what == "scheduler.retire"
        answer = await super().call(what, effect)
        if what == "scheduler.snapshot":
            await asyncio.sleep(3.0)
        return answer


async def stopped_beside_a_list() -> tuple[int, bool]:
    """How often an agent was stopped whose stop was answered while a list was in transit; whether
    it ended."""
    store, cluster, line = Store(), Cluster(), Slow()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    reconciler = Reconciler(fleet, FakeScheduler(cluster, line), specs, Metrics())
    task = asyncio.ensure_future(reconciler.run())
    await fleet.records.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(30.0)
    assert fleet.placements[slug_of(ONE)]
    reconciler.informer.resync("test", now=True)
    await asyncio.sleep(1.0)
    await fleet.records.deregister([ONE])
    await asyncio.sleep(30.0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    found = fleet.placements.get(slug_of(ONE), ())
    return line.stops, all(one.state is PlacementState.DEAD for one in found)


def test_s5_an_agent_is_not_stopped_again_for_a_list_from_before() -> None:
    """A list begun before a stop was answered shows the agent running, but causes no second
    stop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        stops, gone = runner.run(stopped_beside_a_list())
    assert stops == 1
    assert gone


class Overtaken(Line):
    """The first read of the registry takes two seconds, all others none."""

    first = True

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        answer = await super().call(what, effect)
        if what == "registry.read" and self.first:
            self.first = False
            await asyncio.sleep(2.0)
        return answer


@dataclass
class Late(SoleOwner):
    """Holds its shard from a moment after the start."""

    since: Monotonic | None = None

    def terms(self) -> Mapping[Shard, Term]:
        return {} if self.since is None else {Shard(0): Term(1, self.since)}


async def lease_beside_a_read() -> bool:
    """Whether a device gets its agent if the lease came during the first read."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store, Overtaken()), Limits(), clock)
    leases = Late()
    specs = {SPEC.agent_class: SPEC}
    reconciler = Reconciler(fleet, FakeScheduler(cluster), specs, Metrics(), leases)
    task = asyncio.ensure_future(reconciler.run())
    await asyncio.sleep(1.0)
    leases.since = clock.monotonic()
    leases.changed.set()
    await asyncio.sleep(5.0)
    await fleet.records.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(60.0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return bool(fleet.placements.get(slug_of(ONE)))


def test_l1_a_read_from_before_the_lease_that_ends_last_does_not_undo_the_one_after() -> None:
    """Two reads of the registry overlap, the older one ending last: the shard is still
    reconciled."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(lease_beside_a_read())


async def cut_short() -> tuple[bool, bool]:
    """Whether the record was gone after a truncated answer of the watch, and whether it is known
    after a while."""
    store, cluster, line = Store(), Cluster(), CutShort()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store, line), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    task = asyncio.ensure_future(
        Reconciler(fleet, FakeScheduler(cluster, Refusing()), specs, Metrics()).run()
    )
    other = Fleet(FakeRegistry(store), Limits(), clock)
    await other.records.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(60.0)
    assert slug_of(ONE) in fleet.records
    line.armed = True
    await other.records.register([Device(DeviceId("two"), SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(0.5)
    lost = slug_of(ONE) not in fleet.records
    line.armed = False
    # There are no more writes, so the watch has nothing to report.
    await asyncio.sleep(2 * DOUBT_EVERY_S)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return lost, slug_of(ONE) in fleet.records


@dataclass
class Sharing(Late):
    """One of several replicas, which come and go."""

    advertise: str = "http://a"
    there: tuple[str, ...] = ("http://a", "http://b")

    def replicas(self) -> list[Replica]:
        return [Replica(api, api, 0.0, 1, "1") for api in self.there]

    def knows_all_replicas(self) -> bool:
        return True


class Preparing(Line):
    """Records calls in order; refuses to prepare while `refuses` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self.refuses = False

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if what == "scheduler.prepare" and self.refuses:
            raise TransientError("no")
        self.done.append(what)
        return await super().call(what, effect)


async def prepared_for_a_shard() -> tuple[list[str], list[int]]:
    """The calls since a shard was taken over, and how often the scheduler was prepared by then,
    after a replica has joined and after one has gone."""
    store, cluster, line = Store(), Cluster(), Preparing()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet, leases = Fleet(FakeRegistry(store), Limits(resync_s=3600.0), clock), Sharing()
    specs = {SPEC.agent_class: SPEC}
    scheduler = FakeScheduler(cluster, line)
    reconciler = Reconciler(fleet, scheduler, specs, Metrics(), leases)
    task = asyncio.ensure_future(reconciler.run())
    await fleet.records.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(5.0)
    line.refuses = True
    line.done.clear()
    leases.since = clock.monotonic()
    leases.changed.set()
    await asyncio.sleep(20.0)
    assert "scheduler.ensure" not in line.done
    line.refuses = False
    await asyncio.sleep(20.0)
    took_over = list(line.done)
    counts = [line.done.count("scheduler.prepare")]
    for there in (("http://a", "http://b", "http://c"), ("http://a", "http://c")):
        leases.there = there
        leases.changed.set()
        await asyncio.sleep(5.0)
        counts.append(line.done.count("scheduler.prepare"))
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return took_over, counts


def test_who_takes_a_shard_over_prepares_first_and_again_when_another_replica_goes() -> None:
    """Nothing is started from what the previous holder prepared. A joining replica changes nothing;
    when one goes, parents that may name it are written at once."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        done, counts = runner.run(prepared_for_a_shard())
    assert done.index("scheduler.prepare") < done.index("scheduler.ensure")
    assert counts == [1, 1, 2]


def test_s8_an_answer_that_was_cut_short_is_read_again() -> None:
    """Records that one answer omitted are soon known again, although the store's index does not
    move."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        lost, known = runner.run(cut_short())
    assert lost
    assert known


class NoParents(Line):
    """While armed, the scheduler's parents can't be registered."""

    armed = True

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if what == "scheduler.prepare" and self.armed:
            raise TransientError("no leader")
        return await super().call(what, effect)


async def started_after_the_parent(how: str) -> float:
    """A device is added while the parent is gone. Returns how long after the parent is back it is
    started. `lost`: nothing else is wrong; `outage`: for 200 s the parent can't be registered again
    either; `operator`: like `outage`, and the operator registers it."""
    store, cluster, line = Store(), Cluster(), NoParents()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    line.armed = False
    reconciler = Reconciler(fleet, FakeScheduler(cluster, line), specs, Metrics())
    task = asyncio.ensure_future(reconciler.run())
    await asyncio.wait_for(fleet.readiness.event.wait(), 10.0)
    cluster.parents.clear()
    line.armed = how != "lost"
    await fleet.records.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    if line.armed:
        await asyncio.sleep(200.0)
        assert not cluster.jobs
        assert "no parent job" in reconciler.executor.obstacles[slug_of(ONE)]
    back = clock.monotonic()
    line.armed = False
    if how == "operator":
        cluster.prepare([SPEC.agent_class])
    while not cluster.jobs:
        await asyncio.sleep(0.1)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return clock.monotonic() - back


def test_w6_a_back_off_ends_when_the_parent_is_back() -> None:
    """A device added while the parent job was stopped is started with the repair: within a second
    if possible at once, otherwise at the next attempt, and not after minutes of its own
    back-off."""
    for how, within_s in (("lost", 2.0), ("outage", 31.0), ("operator", 31.0)):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            assert runner.run(started_after_the_parent(how)) < within_s, how


async def tries_of_a_broken_class(error: WatchdogError) -> int:
    """Number of attempted starts in half an hour while `prepare` succeeds and each start fails with
    `error`."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    tries = 0

    class Liar(Line):
        async def call(self, what: str, effect: Callable[[], T]) -> T:
            nonlocal tries
            if what == "scheduler.ensure":
                tries += 1
                raise error
            return await super().call(what, effect)

    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    reconciler = Reconciler(fleet, FakeScheduler(cluster, Liar()), specs, Metrics())
    task = asyncio.ensure_future(reconciler.run())
    await asyncio.wait_for(fleet.readiness.event.wait(), 10.0)
    await fleet.records.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(1800.0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return tries


def test_w6_a_repair_that_does_not_help_is_tried_less_and_less_often() -> None:
    """A start that reports after each successful `prepare` that the parent is missing is tried at
    most three times per `resync`: each `prepare` ends its back-off, and at the beginning there are
    some more of them."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        missing = runner.run(tries_of_a_broken_class(UnpreparedError("no parent")))
    assert 10 < missing < 3 * 1800.0 / Limits().resync_s


async def pauses_of_a_device_that_never_starts() -> list[float]:
    """Seconds between attempts for a device whose starts all fail, in two hours, including
    sweeps."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    tries: list[float] = []

    class Refuses(Line):
        async def call(self, what: str, effect: Callable[[], T]) -> T:
            if what == "scheduler.ensure":
                tries.append(clock.monotonic())
                raise TerminalError("refused")
            return await super().call(what, effect)

    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    reconciler = Reconciler(fleet, FakeScheduler(cluster, Refuses()), specs, Metrics())
    task = asyncio.ensure_future(reconciler.run())
    await asyncio.wait_for(fleet.readiness.event.wait(), 10.0)
    await fleet.records.register([Device(ONE, SPEC.agent_class, "127.0.0.1")])
    await asyncio.sleep(7200.0)
    (budget,) = reconciler.executor.budgets.values()
    assert budget.failures == len(tries)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return [later - before for before, later in pairwise(tries)]


def test_w6_the_back_off_of_a_device_that_never_started_grows_to_its_maximum() -> None:
    """The sweep every 30 s forgets no failures of a device that was never started: its pauses are
    drawn from up to `retry.max`, and some are longer than half of that."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        pauses = runner.run(pauses_of_a_device_that_never_starts())
    assert max(pauses) > Limits().backoff_max_s / 2
    assert len(pauses) < 2 * 7200 / (Limits().backoff_max_s / 2)


async def wiped(how: str) -> tuple[Fleet, bool, str]:
    """A running fleet of 12 whose store changes under it: `all` is wiped, `rows` lose their records
    and keep the sentinel, `down` does not answer. Returns the fleet a minute later, whether it was
    ready then, and the next step in the status; then the store is restored, and the fleet must be
    ready again."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    down = Down()
    fleet = Fleet(FakeRegistry(store, down), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    task = asyncio.ensure_future(Reconciler(fleet, FakeScheduler(cluster), specs, Metrics()).run())
    names = [DeviceId(f"cam {number}") for number in range(12)]
    await fleet.records.register([Device(name, SPEC.agent_class, "127.0.0.1") for name in names])
    await asyncio.sleep(30.0)
    kept, rows = store.installation, dict(store.rows)
    if how == "all":
        store.installation = ""
        store.rows.clear()
    elif how == "rows":
        store.rows.clear()
    else:
        down.armed = True
    store.index += 1
    store.news.tell(frozenset(rows))
    await asyncio.sleep(60.0)
    assert sum(not job.dead for job in cluster.jobs.values()) == 12, "nothing is stopped"
    status = fleet.views.status()
    breaker = status["breaker"]
    assert isinstance(breaker, dict)
    ready, said = fleet.readiness.ready, f"{status['reason']} {breaker['next']}"
    assert status["ready"] is ready
    store.installation, down.armed = kept, False
    store.rows.update(rows)
    store.index += 1
    store.news.tell(frozenset(rows))
    await asyncio.sleep(60.0)
    assert fleet.readiness.ready
    assert len(fleet.records) == 12
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return fleet, ready, said


class Down(Line):
    """While armed, the registry does not answer."""

    armed = False

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if self.armed and what.startswith("registry"):
            raise TransientError("no leader")
        return await super().call(what, effect)


def test_w5_a_registry_that_is_gone_is_not_ready_and_asks_for_an_import() -> None:
    """Wiped under a running fleet: not ready, an event, and the advice is `registry import`. If the
    records but not the sentinel are lost, the stops on hold report it. A registry that does not
    answer for a while is neither: the fleet keeps running, and no restore is suggested."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        fleet, ready, said = runner.run(wiped("all"))
    assert not ready
    assert "registry import" in said
    assert "12 devices" in said
    assert [event.kind for event in fleet.events.own.after(0, 999)[0]].count("registry.gone") == 1
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        _, ready, said = runner.run(wiped("rows"))
    assert "if records were lost: nomad-watchdog registry import FILE" in said
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        _, ready, said = runner.run(wiped("down"))
    assert (ready, "import" in said) == (True, False)


class Full(Line):
    """While armed, the scheduler has no node for another agent."""

    armed = False

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if what == "scheduler.capacity" and self.armed:
            return Capacity(room=False, reason="3 agents wait for a node")  # type: ignore[return-value]
        return await super().call(what, effect)


async def drained(reconciler: Reconciler, slug: Slug) -> None:
    """The agent of this device is ready and healthy, and its node is being drained."""
    fleet = reconciler.fleet
    record, (agent, *_) = fleet.records[slug], fleet.placements[slug]
    well = Report(
        record.device.id, slug, record.epoch, agent.instances[0], 1, ready=True,
        state=AgentState.OK, was_ready=True, misses=0, confirmed=False, reason="", listen="", version="1",
    )  # fmt: skip
    await fleet.reports.receive(well)
    assert "running and ready" in str(fleet.views.explain(slug)["next"])
    fleet.placements[slug] = (replace(agent, reason="node n1 is being drained"),)


async def what_comes_next() -> dict[str, str]:
    """`next` of `explain` in every state that a device can wait in."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    line = Full()
    limits = Limits(presence=PresenceRules(grace_s=500.0))
    fleet = Fleet(FakeRegistry(store), limits, clock)
    reconciler = Reconciler(
        fleet, FakeScheduler(cluster, line), {SPEC.agent_class: SPEC}, Metrics()
    )
    task = asyncio.ensure_future(reconciler.run())
    said: dict[str, str] = {}

    def note(name: str, device: str) -> None:
        said[name] = str(fleet.views.explain(slug_of(DeviceId(device)))["next"])

    def device(name: str) -> Device:
        return Device(DeviceId(name), SPEC.agent_class, "127.0.0.1")

    await asyncio.wait_for(fleet.readiness.event.wait(), 10.0)
    await fleet.records.register([device(f"cam {number}") for number in range(12)])
    await asyncio.sleep(5.0)
    note("grace", "cam 1")
    await reconciler.classes.configure({SPEC.agent_class: replace(SPEC, spec_hash="other")})
    await asyncio.sleep(3.0)
    note("window", "cam 1")
    await reconciler.classes.configure({SPEC.agent_class: SPEC})
    await asyncio.sleep(limits.startup_grace_s)
    note("late", "cam 1")
    fleet.recorder.forget(slug_of(DeviceId("cam 1")))  # as after a restart
    note("unseen", "cam 1")
    slug = slug_of(DeviceId("cam 1"))
    (agent,) = fleet.placements[slug]
    for state in (PlacementState.LOST, PlacementState.PENDING, PlacementState.RESTARTING):
        fleet.placements[slug] = (replace(agent, state=state, node="n1", reason="why"),)
        note(state.value, "cam 1")
    fleet.placements[slug] = (agent,)
    line.armed = True
    await fleet.records.register([device("one"), device("two")])
    await asyncio.sleep(1.0)
    await fleet.records.register([device("late")])
    await asyncio.sleep(1.0)
    note("full", "late")
    line.armed = False
    await asyncio.sleep(60.0)
    await fleet.records.deregister([DeviceId("cam 2")], Departure.DISCONNECTED)
    note("kept", "cam 2")
    await fleet.records.deregister([DeviceId("cam 3")])
    await asyncio.sleep(60.0)
    note("left", "cam 3")
    now = clock.wall()
    target = Target(devices=frozenset({"cam 4"}))
    await fleet.presence.pauses.add(
        Pause(id="p1", target=target, begins=now, ends=WallTime(now + 90.0), reason="", by="me")
    )
    note("paused", "cam 4")
    cluster.parents.clear()
    reconciler.scheduler = reconciler.executor.scheduler = FakeScheduler(cluster, Refusing())
    await fleet.records.register([device("bad")])
    await asyncio.sleep(2.0)
    note("failed", "bad")
    reconciler.scheduler = reconciler.executor.scheduler = FakeScheduler(cluster, line)
    slug = slug_of(DeviceId("cam 6"))
    for number, believed in enumerate(
        (AgentState.SUSPECT, AgentState.UNABLE, AgentState.DEGRADED), 1
    ):
        record, (agent, *_) = fleet.records[slug], fleet.placements[slug]
        fleet.placements[slug] = (replace(agent, node="n1"),)
        await fleet.reports.receive(
            Report(
                record.device.id,
                slug,
                record.epoch,
                record.instance or (agent.instances or ("i",))[0],
                number,
                ready=True,
                state=believed,
                was_ready=True,
                misses=3,
                confirmed=False,
                reason="why",
                listen="",
                version="1",
            )
        )
        note(believed.value, "cam 6")
    await drained(reconciler, slug_of(DeviceId("cam 7")))
    note("drained", "cam 7")
    await reconciler.classes.configure({})
    note("class", "cam 5")
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return said


def test_explain_always_says_what_comes_next() -> None:
    """During a start-up grace and after it, without a node, after a failed start, in a full window,
    during a departure's grace and a pause, and without a class: `explain` says what the device
    waits for, and for how long if that is known."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        said = runner.run(what_comes_next())
    assert all(said.values()), said
    assert said["drained"] == "node n1 is being drained"
    assert "if it is not within" in said["grace"]
    assert "start-up grace of 60 s is over" in said["late"]
    assert "this replica did not start it" in said["unseen"]
    assert "n1 does not answer" in said["lost"]
    assert said["pending"].startswith("waiting until the scheduler finds a node for the agent: why")
    assert said["restarting"].startswith("the scheduler restarts the agent: why; without progress")
    assert "waits for room: 3 agents wait for a node" in said["full"]
    assert "unless the device comes back" in said["kept"]
    assert said["left"] == "nothing: the device has left"
    assert said["paused"] == "nothing until the pause p1 ends, in 90 s"
    assert "start failed: no; next try in" in said["failed"]
    assert "waits for its turn: 12 devices wait, 5 at a time, 12 have no" in said["window"]
    assert "until agent class" in said["class"]
    assert "within 120 s" in said["suspect"]
    assert "fix what the reason names" in said["degraded"]
    assert "check what the reason names on n1" in said["unable"]


async def metrics_when_ready() -> str:
    """The metrics at the moment when a control plane that starts with three devices becomes
    ready."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    before = Fleet(FakeRegistry(store), Limits(), clock)
    before.records.reset({}, 0)
    await before.records.register(
        [Device(DeviceId(name), SPEC.agent_class, "127.0.0.1") for name in ("a", "b", "c")]
    )
    metrics, fleet = Metrics(), Fleet(FakeRegistry(store), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    task = asyncio.ensure_future(Reconciler(fleet, FakeScheduler(cluster), specs, metrics).run())
    await asyncio.wait_for(fleet.readiness.event.wait(), 10.0)
    found = metrics.render().decode()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return found


def test_devices_are_counted_as_soon_as_the_service_is_ready() -> None:
    """A scrape right after a restart counts every device: a gauge at 0 would resolve alerts."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        text = runner.run(metrics_when_ready())
    counts = [
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("nomad_watchdog_devices{")
    ]
    assert sum(counts) == 3.0


async def never_started() -> tuple[list[float], list[str], str, set[PlacementState]]:
    """Twelve agents that the scheduler places but never starts, for 300 s: when placements were
    given up, all reasons, `explain` for one at 100 s, and the states at the end."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    cluster.pace.start = (1e9, 1e9)
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    specs = {SPEC.agent_class: SPEC}
    reconciler = Reconciler(fleet, FakeScheduler(cluster), specs, Metrics())
    task = asyncio.ensure_future(reconciler.run())
    names = [DeviceId(f"device {n}") for n in range(12)]
    await fleet.records.register([Device(name, SPEC.agent_class, "127.0.0.1") for name in names])
    began = clock.wall()
    await asyncio.sleep(100.0)
    explained = str(fleet.views.explain(slug_of(names[0]))["next"])
    await asyncio.sleep(200.0)
    cluster.pace.start = (0.0, 0.02)
    await asyncio.sleep(900.0)
    given_up = [e for e in fleet.events.own.after(0, 10_000)[0] if e.kind == "plan.replace"]
    states: set[PlacementState] = {
        one.state
        for found in fleet.placements.values()
        for one in found
        if one.state is not PlacementState.DEAD
    }
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return [e.at - began for e in given_up], [e.text for e in given_up], explained, states


def test_agents_that_are_never_started_are_given_up_some_at_a_time() -> None:
    """After `agents.start_max`, at most five of them are given up within that time (the window of a
    small fleet), each with the reason, until all run; `explain` says when that will be."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        times, reasons, explained, states = runner.run(never_started())
    assert len(times) == 17  # twelve, and the first five again
    assert 180.0 < times[0] < 215.0
    for first, sixth in zip(times, times[5:], strict=False):
        assert sixth - first >= 180.0
    assert all("without progress, longer than" in text for text in reasons)
    assert "without progress for 8" in explained or "without progress for 7" in explained
    assert states == {PlacementState.RUNNING}
