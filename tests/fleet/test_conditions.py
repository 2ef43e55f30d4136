"""Conditions in the registry: written when they begin and end, kept over agents and control plane
restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nomad_watchdog.controllers import condition_writer
from nomad_watchdog.controllers.condition_writer import ConditionWriter
from nomad_watchdog.core import presence
from nomad_watchdog.errors import TransientError
from nomad_watchdog.events.log import EventLog
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, Shard, Slug, slug_of
from nomad_watchdog.model import (
    AgentState,
    Device,
    DeviceRecord,
    Epoch,
    Limits,
    Monotonic,
    Placement,
    PlacementState,
    Report,
    Unheard,
    VerdictState,
)
from nomad_watchdog.registry import CommitGuard
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.leases import SoleOwner, Term
from nomad_watchdog.replicas.ownership import ShardOwnership
from tests.fleet.test_event_recorder import Site


class Counting(SqliteRegistry):
    """Counts commits, and fails on demand."""

    def __init__(self, *, path: Path) -> None:
        super().__init__(path=path)
        self.commits: list[int] = []
        self.away = False
        self.meanwhile: Callable[[], Awaitable[None]] | None = None
        """Called while the next commit is in progress."""

    async def commit(
        self, records: Sequence[DeviceRecord], guards: Sequence[CommitGuard] = ()
    ) -> Sequence[DeviceRecord | None]:
        if self.away:
            raise TransientError("the registry is away")
        self.commits.append(len(records))
        stored = await super().commit(records, guards)
        if (happens := self.meanwhile) is not None:
            self.meanwhile = None
            await happens()
        return stored


class Plant(Site):
    """A site with its records in the registry; control planes come and go."""

    def __init__(self, registry: Counting) -> None:
        super().__init__(registry)
        self.registry = registry
        self.leases = SoleOwner()
        self._serve(self.fleet)

    def _serve(self, fleet: Fleet) -> None:
        self.ownership = ShardOwnership(self.leases)
        self.writer = ConditionWriter(fleet, self.ownership, self.leases)

    async def grow(self, count: int, node: str = "n") -> list[Slug]:
        names = [DeviceId(f"{node}-{number}") for number in range(count)]
        await self.fleet.records.register([Device(name, "default", "10.0.0.1") for name in names])
        slugs = [slug_of(name) for name in names]
        await self.replace_agents(slugs, node)
        return slugs

    async def replace_agents(self, slugs: Sequence[Slug], node: str = "n") -> None:
        """The next epoch of each, bound to a new running instance."""
        records = [self.fleet.records[slug] for slug in slugs]
        moved = [presence.advance(one, Epoch(one.epoch + 1)) for one in records]
        stored = await self.fleet.records.commit(
            [presence.bind(one, f"i{one.epoch}") for one in moved]
        )
        self.fleet.records.learn([one for one in stored if one is not None])
        for record in map(self.fleet.records.__getitem__, slugs):
            self.run(record, PlacementState.RUNNING, node)

    def run(self, record: DeviceRecord, state: PlacementState, node: str = "n") -> None:
        self.fleet.placements[record.slug] = (
            Placement(
                record.slug, record.device.id, record.epoch, "default", "h", state, "r",
                (record.instance,), node,
            ),
        )  # fmt: skip

    async def restart(self, *, history: EventLog | None = None) -> None:
        """Another control plane on the same registry, 100 s later."""
        self.clock.now += 100.0
        placements = self.fleet.placements
        self.fleet = Fleet(self.registry, Limits(), self.clock, history)
        self._serve(self.fleet)
        snapshot = await self.registry.read()
        self.fleet.records.reset(snapshot.records, snapshot.index)
        self.fleet.apply_placements(placements)

    def since(self, slug: Slug) -> float:
        view = self.fleet.views.device(slug)
        assert view is not None
        return self.clock.now - view.since_s

    def state(self, slug: Slug) -> VerdictState:
        return self.fleet.verdicts.judge(slug).state


@pytest.fixture
async def plant(tmp_path: Path) -> AsyncIterator[Plant]:
    registry = Counting(path=tmp_path / "registry.db")
    await registry.initialise()
    yield Plant(registry)
    await registry.close()


async def test_an_outage_outlives_agents_and_control_planes(plant: Plant) -> None:
    """Through a stop, a roll-out, a lost node and two restarts of the control plane a dead device
    stays offline with the same start time, without an event, until an accepted agent reports that
    it answers."""
    (dead,) = await plant.grow(1)
    await plant.say(dead)
    plant.clock.now += 50.0
    await plant.say(dead, AgentState.OFFLINE, state_age_s=2.0, reason="no answer of tcp:80, icmp")
    began = plant.clock.now - 2.0
    assert plant.since(dead) == pytest.approx(began)
    assert await plant.writer.write() == 0
    events = plant.kinds()

    record = plant.fleet.records[dead]
    plant.run(record, PlacementState.STOPPING)
    assert plant.state(dead) is VerdictState.OFFLINE
    plant.fleet.placements.pop(dead)
    plant.clock.now += 500.0
    assert plant.state(dead) is VerdictState.OFFLINE
    assert plant.fleet.agents.unready() == 1
    await plant.replace_agents([dead])
    assert plant.fleet.verdicts.judge(dead).reason == (
        "no answer of tcp:80, icmp; its agent can't check this now (agent running, no report of it; for 500 s)"
    )
    plant.run(plant.fleet.records[dead], PlacementState.LOST)
    assert plant.state(dead) is VerdictState.OFFLINE
    assert plant.since(dead) == pytest.approx(began)
    assert plant.kinds() == events

    for _ in range(2):
        await plant.restart()
        plant.run(plant.fleet.records[dead], PlacementState.RUNNING)
        assert plant.state(dead) is VerdictState.OFFLINE
        assert plant.since(dead) == pytest.approx(began)

    await plant.say(dead, AgentState.SUSPECT, ready=False)
    assert plant.state(dead) is VerdictState.OFFLINE
    await plant.say(dead, AgentState.OFFLINE)
    assert plant.since(dead) == pytest.approx(began)
    await plant.say(dead, AgentState.OK)
    assert plant.state(dead) is VerdictState.WATCHED
    await plant.writer.write()
    stored = await plant.registry.get(dead)
    assert stored is not None
    assert stored.condition is None


async def test_a_condition_is_written_when_it_begins_and_ends_and_never_for_a_report(
    plant: Plant,
) -> None:
    """Twenty reports of an outage are one write, and its end is one more; offline that becomes
    degraded is a new condition with its own start time."""
    (slug,) = await plant.grow(1)
    plant.registry.commits.clear()
    for state in (AgentState.OK, AgentState.OFFLINE, AgentState.DEGRADED, AgentState.OK):
        for _ in range(20):
            plant.clock.now += 15.0
            await plant.say(slug, state)
            await plant.writer.write()
    assert plant.registry.commits == [1, 1, 1]


async def test_the_agent_that_confirms_a_condition_renews_its_reason_once(plant: Plant) -> None:
    """A new agent's own evidence replaces its predecessor's, with the same start time, by one write
    and one event. Another reason of the same agent right after that, and the same reason of a third
    agent, cause none."""
    (slug,) = await plant.grow(1)
    await plant.say(slug, AgentState.OFFLINE, reason="tcp:80: no answer")
    await plant.writer.write()
    began, events = plant.since(slug), plant.kinds()
    for writes, said in ((1, "http:80: refused"), (0, "http:80: no route")):
        if writes:
            await plant.replace_agents([slug])
        plant.registry.commits.clear()
        for _ in range(3):
            await plant.say(slug, AgentState.OFFLINE, reason=said, misses=7)
            await plant.writer.write()
        assert plant.registry.commits == [1] * writes
    stored = await plant.registry.get(slug)
    assert stored is not None
    assert stored.condition is not None
    assert (stored.condition.reason, stored.condition.misses) == ("http:80: refused", 7)
    assert plant.since(slug) == pytest.approx(began)
    assert plant.kinds() - events == {"condition.changed": 1}
    plant.run(stored, PlacementState.STOPPING)
    assert plant.fleet.verdicts.judge(slug).reason.startswith("http:80: refused; ")

    await plant.replace_agents([slug])
    plant.registry.commits.clear()
    await plant.say(slug, AgentState.OFFLINE, reason="http:80: refused")
    await plant.writer.write()
    assert plant.registry.commits == []


@pytest.mark.parametrize("renewed", [False, True], ids=["first", "renewed"])
@pytest.mark.parametrize("then", [AgentState.OK, AgentState.DEGRADED])
async def test_what_is_reported_while_a_condition_is_stored_is_newer(
    plant: Plant, renewed: bool, then: AgentState
) -> None:
    """If a device comes back or improves while its outage is being stored, there is no second
    outage, and in the end the registry agrees."""
    (slug,) = await plant.grow(1)
    await plant.say(slug)
    await plant.say(slug, AgentState.OFFLINE, reason="tcp:80: no answer")
    if renewed:
        await plant.writer.write()
        await plant.replace_agents([slug])
        await plant.say(slug, AgentState.OFFLINE, reason="http:80: refused")

    async def reported() -> None:
        await plant.say(slug, then)
        plant.clock.now += 0.1

    plant.registry.meanwhile = reported
    await plant.writer.write()
    wanted = plant.state(slug)
    assert wanted is (VerdictState.WATCHED if then is AgentState.OK else VerdictState.DEGRADED)
    assert plant.kinds()["verdict.offline"] == 1
    await plant.writer.write()
    stored = await plant.registry.get(slug)
    assert stored is not None
    assert (stored.condition.state.value if stored.condition else "watched") == wanted.value
    assert plant.state(slug) is wanted
    assert plant.fleet.verdicts.conditions.slugs() == []


async def test_outages_at_once_are_few_transactions(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices that go offline at once cost one commit per batch, and the end of their outages as
    many."""
    monkeypatch.setattr(condition_writer, "MAX_BATCH", 100)
    slugs = await plant.grow(300)
    for state in (AgentState.OFFLINE, AgentState.OK):
        plant.registry.commits.clear()
        for slug in slugs:
            await plant.say(slug, state)
        assert await plant.writer.write() == 0
        assert plant.registry.commits == [100] * 3
        snapshot = await plant.registry.read()
        sick = sum(one.condition is not None for one in snapshot.records.values())
        assert sick == (300 if state is AgentState.OFFLINE else 0)


async def test_an_outage_of_the_registry_loses_no_condition(plant: Plant) -> None:
    """A condition that can't be written is still shown, and written when the registry is back; if
    another writer changes the record, one more attempt is needed."""
    (slug,) = await plant.grow(1)
    await plant.say(slug, AgentState.OFFLINE)
    plant.registry.away = True
    with pytest.raises(TransientError):
        await plant.writer.write()
    plant.fleet.placements.pop(slug)
    assert plant.state(slug) is VerdictState.OFFLINE
    plant.registry.away = False

    other = Fleet(plant.registry, Limits(), plant.clock)
    await other.records.register([Device(DeviceId("n-0"), "default", "10.0.0.2")])
    assert await plant.writer.write() == 1
    assert await plant.writer.write() == 0
    stored = await plant.registry.get(slug)
    assert stored is not None
    assert stored.condition is not None
    assert stored.device.address == "10.0.0.2"


class Nobody(SoleOwner):
    """Holds no shard until it is told to."""

    held = False

    def terms(self) -> dict[Shard, Term]:
        return {Shard(0): Term(1, Monotonic(0.0))} if self.held else {}


async def test_only_the_holder_of_the_shard_writes(plant: Plant) -> None:
    """A replica that holds no shard writes nothing. Once it holds the shard, it writes the last
    reports of its agents, but none that is too old."""
    plant.leases = leases = Nobody()
    plant._serve(plant.fleet)
    fresh, old = await plant.grow(2)
    plant.registry.commits.clear()
    await plant.say(old, AgentState.OFFLINE)
    plant.clock.now += Limits().report_stale_s + 1.0
    await plant.say(fresh, AgentState.OFFLINE)
    await plant.writer.write()
    assert plant.registry.commits == []

    leases.held = True
    await plant.writer.write()
    assert plant.registry.commits == [1]
    stored = await plant.registry.read()
    sick = [slug for slug, one in stored.records.items() if one.condition is not None]
    assert sick == [fresh]


async def test_what_is_handed_down_to_a_new_agent(plant: Plant) -> None:
    """An agent that has no result of its own gets what its predecessor knew; one that has does
    not."""
    (slug,) = await plant.grow(1)
    await plant.say(slug, AgentState.OFFLINE, reason="no answer", misses=4)
    await plant.writer.write()
    await plant.replace_agents([slug])

    def said(state: AgentState, *, ready: bool) -> Report:
        record = plant.fleet.records[slug]
        return Report(
            record.device.id, slug, record.epoch, record.instance, 1, ready=ready, state=state,
            was_ready=False, misses=0, confirmed=False, reason="", listen="", version="1",
        )  # fmt: skip

    told = plant.fleet.reports.inherited(said(AgentState.OK, ready=False))
    assert told is not None
    assert (told.state.value, told.reason, told.misses) == ("offline", "no answer", 4)
    for state in (AgentState.SUSPECT, AgentState.REPAIRING, AgentState.UNABLE):
        assert plant.fleet.reports.inherited(said(state, ready=True)) == told
    for state in (AgentState.OK, AgentState.DEGRADED, AgentState.OFFLINE):
        assert plant.fleet.reports.inherited(said(state, ready=True)) is None


async def test_since_is_as_it_was_after_a_restart(plant: Plant) -> None:
    """V6: every state continues from its start time: from the registry, from the stored events,
    from the agent. A restart is not a change, so no event reports a state again."""
    fine, dead, newer, aged, lonely = slugs = await plant.grow(5)
    for slug in (fine, newer, lonely):
        await plant.say(slug)
    plant.clock.now += 10.0
    await plant.say(dead, AgentState.DEGRADED)
    plant.clock.now += 100.0
    for slug in (fine, newer):
        await plant.say(slug)
    plant.fleet.verdicts.judge_all()
    await plant.say(dead, AgentState.DEGRADED)
    before = {slug: plant.since(slug) for slug in slugs}
    assert plant.state(lonely) is VerdictState.UNWATCHED
    await plant.writer.write()
    told = [
        (event.slug, event.kind, event.at)
        for event in plant.fleet.events.own.recent()
        if event.kind.startswith("verdict.")
    ]

    await plant.restart()
    plant.fleet.verdicts.restore(told)
    plant.fleet.verdicts.judge_all()
    await plant.say(fine, state_age_s=210.0)
    await plant.say(newer, state_age_s=30.0)
    await plant.say(dead, AgentState.SUSPECT)
    await plant.say(aged, state_age_s=1_000.0)
    assert plant.since(fine) == pytest.approx(before[fine])
    assert plant.since(dead) == pytest.approx(before[dead])
    assert plant.since(newer) == pytest.approx(plant.clock.now - 30.0)
    assert plant.since(aged) == pytest.approx(plant.clock.now - 1_000.0)
    assert dict(plant.kinds()) == {"verdict.watched": 1}
    plant.clock.now += 100.0
    assert plant.state(lonely) is VerdictState.UNWATCHED
    assert plant.since(lonely) == pytest.approx(before[lonely])


async def test_a_restart_of_the_control_plane_is_no_start_of_an_agent(plant: Plant) -> None:
    """A device that was suspect or unwatched stays so, with the same start time and without an
    event, until its agent's first report to the new process; after `report_stale` without one it is
    unwatched. A new agent is starting."""
    doubtful, blind, mute, moved = slugs = await plant.grow(4)
    for slug in slugs:
        await plant.say(slug)
    plant.clock.now += 20.0
    for slug in (doubtful, mute, moved):
        await plant.say(slug, AgentState.SUSPECT)
    await plant.say(blind, AgentState.UNABLE)
    before = {slug: plant.since(slug) for slug in slugs}
    told = [
        (event.slug, event.kind, event.at)
        for event in plant.fleet.events.own.recent()
        if event.kind.startswith("verdict.")
    ]
    await plant.replace_agents([moved])
    record = presence.advance(plant.fleet.records[moved], Epoch(9))
    await plant.fleet.records.commit([record])

    await plant.restart()
    plant.run(plant.fleet.records[moved], PlacementState.RUNNING)
    plant.fleet.verdicts.restore(sorted(told, key=lambda one: one[2]))
    assert plant.state(doubtful) is plant.state(mute) is VerdictState.SUSPECT
    assert plant.state(blind) is VerdictState.UNWATCHED
    assert plant.state(moved) is VerdictState.STARTING
    assert plant.fleet.verdicts.judge(blind).reason == (
        "unwatched before this control plane started; its agent has not reported here yet"
    )
    plant.clock.now += 10.0
    assert plant.state(doubtful) is VerdictState.SUSPECT  # judged more than once
    for slug in (doubtful, blind, mute):
        assert plant.since(slug) == pytest.approx(before[slug])
    assert plant.kinds() == {}
    await plant.say(doubtful)
    assert plant.state(doubtful) is VerdictState.WATCHED
    plant.clock.now += Limits().report_stale_s
    found = plant.fleet.verdicts.judge(mute)
    assert (found.state, found.unheard) == (VerdictState.UNWATCHED, Unheard.SILENT)


async def test_a_reason_of_another_kind_is_stored_told_and_outlives_a_restart(plant: Plant) -> None:
    """A device comes back with HTTP 503: the condition has the new reason at once, with the same
    start time, so that `explain` is consistent and the next control plane shows it; one event
    reports it."""
    (slug,) = await plant.grow(1)
    await plant.say(slug, AgentState.DEGRADED, reason="http:80: no route to host; but icmp answers")
    await plant.writer.write()
    began = plant.since(slug)
    plant.clock.now += 1.0
    new = "http:80: status 503, not 200; but icmp answers"
    await plant.say(slug, AgentState.DEGRADED, reason=new)
    shown = plant.fleet.views.explain(slug)
    assert shown["reason"] == new
    assert isinstance(shown["condition"], dict)
    assert shown["condition"]["reason"] == new
    assert await plant.writer.write() == 0
    (event,) = [one for one in plant.fleet.events.own.recent() if one.kind == "condition.changed"]
    assert event.text == new
    assert event.data["was"] == "http:80: no route to host; but icmp answers"
    await plant.restart()
    found = plant.fleet.verdicts.judge(slug)
    assert (found.state, found.reason[: len(new)]) == (VerdictState.DEGRADED, new)
    assert plant.since(slug) == pytest.approx(began)


async def test_reasons_that_alternate_or_count_are_few_writes(plant: Plant) -> None:
    """For an hour a reason changes with each report: two alternating kinds are stored less and less
    often, one that differs only in numbers never."""
    turns, counts = await plant.grow(2)
    for slug in (turns, counts):
        await plant.say(slug, AgentState.DEGRADED, reason="tcp:80: no answer")
    await plant.say(counts, AgentState.DEGRADED, reason="http:80: took 0.5 s (warn_time is 0.2)")
    await plant.writer.write()
    plant.registry.commits.clear()
    for number in range(240):
        plant.clock.now += 15.0
        said = "tcp:80: no answer" if number % 2 else "tcp:80: connection refused"
        await plant.say(turns, AgentState.DEGRADED, reason=said)
        slow = f"http:80: took {number / 100} s (warn_time is 0.2)"
        await plant.say(counts, AgentState.DEGRADED, reason=slow)
        await plant.writer.write()
    assert 5 <= sum(plant.registry.commits) <= 20
    told = [one for one in plant.fleet.events.own.recent() if one.kind == "condition.changed"]
    assert len([one for one in told if one.slug == counts]) == 1


async def test_a_record_that_can_not_hold_a_condition_holds_up_no_other(plant: Plant) -> None:
    """A record that would become too large keeps its condition in memory; the others are
    written."""
    large, small = await plant.grow(2)
    record = plant.fleet.records[large]
    labels = {f"label-{number}": "x" * 150 for number in range(93)}
    wide = replace(record, device=replace(record.device, labels=labels))
    (stored,) = await plant.fleet.records.commit([wide])
    assert stored is not None
    plant.fleet.records.learn([stored])
    for slug in (large, small):
        await plant.say(slug, AgentState.OFFLINE, reason="\N{SNOWMAN}" * 300)
    await plant.writer.write()
    snapshot = await plant.registry.read()
    assert snapshot.records[small].condition is not None
    assert snapshot.records[large].condition is None
    plant.registry.commits.clear()
    await plant.say(large, AgentState.OFFLINE)
    assert plant.fleet.verdicts.conditions.slugs() == []
    plant.fleet.placements.pop(large)
    assert plant.state(large) is VerdictState.OFFLINE
