"""Events about a whole fleet's verdicts: evidence, incidents, measured starts, the state of the
store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.core.acceptance import AcceptanceKind
from nomad_watchdog.events.log import EventLog
from nomad_watchdog.events.store import EventStore
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import (
    AgentState,
    Device,
    DeviceRecord,
    Epoch,
    Limits,
    Monotonic,
    Placement,
    PlacementState,
    Presence,
    Report,
    VerdictState,
    WallTime,
)
from nomad_watchdog.registry.sqlite import SqliteRegistry

BEGAN = time.time()


@dataclass
class TestClock:
    """A clock that advances on command."""

    __test__ = False
    now: float = 1_000.0

    def monotonic(self) -> Monotonic:
        return Monotonic(self.now)

    def wall(self) -> WallTime:
        return WallTime(BEGAN + self.now)


class Site:
    """A fleet with placements and reports from the test; the registry is real."""

    def __init__(self, registry: SqliteRegistry, history: EventLog | None = None) -> None:
        self.clock = TestClock()
        self.fleet = Fleet(registry, Limits(), self.clock, history)
        self.sequence = 0

    def change(self, slug: Slug, **changes: Any) -> None:
        """The device's record gets these other values."""
        record = self.fleet.records[slug]
        self.fleet.records.learn([replace(record, index=record.index + 1, **changes)])

    def add(self, count: int, node: str, *, at_epoch: int = 1) -> list[Slug]:
        slugs = []
        records = dict(self.fleet.records)
        for number in range(count):
            name = DeviceId(f"{node}-{number}")
            slug = slug_of(name)
            records[slug] = DeviceRecord(
                slug,
                Device(name, "default", "10.0.0.1"),
                Presence.PRESENT,
                1,
                Epoch(at_epoch),
                f"i-{name}",
                WallTime(0.0),
                1,
            )
            self.fleet.placements[slug] = (
                Placement(
                    slug,
                    name,
                    Epoch(at_epoch),
                    "default",
                    "h",
                    PlacementState.RUNNING,
                    "r",
                    (f"i-{name}",),
                    node,
                ),
            )
            slugs.append(slug)
        self.fleet.records.reset(records, 1)
        return slugs

    async def say(self, slug: Slug, state: AgentState = AgentState.OK, **more: object) -> None:
        record = self.fleet.records[slug]
        self.sequence += 1
        base = Report(
            record.device.id,
            slug,
            record.epoch,
            record.instance,
            self.sequence,
            ready=True,
            state=state,
            was_ready=True,
            misses=0 if state is AgentState.OK else 4,
            confirmed=state is AgentState.OFFLINE,
            reason="because",
            listen="",
            version="1",
        )
        result = await self.fleet.reports.receive(replace(base, **more))  # type: ignore[arg-type]
        assert result.kind is AcceptanceKind.ACCEPTED

    def kinds(self) -> Counter[str]:
        return Counter(event.kind for event in self.fleet.events.own.recent())


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    yield Site(registry)
    await registry.close()


async def test_a_host_that_goes_down_is_one_incident_of_marked_events(site: Site) -> None:
    """1,000 devices of one host turn offline and come back: one incident opened, one closed, and
    each of the 1,000 device events carries the incident's id."""
    dead = site.add(1_000, "n1")
    others = site.add(600, "n2")
    for slug in (*dead, *others):
        await site.say(slug)
    site.fleet.verdicts.judge_all()

    site.clock.now += 10.0
    for slug in dead:
        await site.say(slug, AgentState.OFFLINE)
    site.fleet.verdicts.judge_all()
    site.clock.now += 2.0
    site.fleet.verdicts.judge_all()
    singles = [e for e in site.fleet.events.own.recent() if e.kind == "verdict.offline"]

    assert len(singles) == 1_000
    (incident,) = site.fleet.recorder.incidents.all()
    assert {event.incident for event in singles} == {incident.id}
    assert site.kinds()["incident.opened"] == 1
    assert site.fleet.recorder.incidents.open_by_kind() == {
        "gateway": 0,
        "host": 1,
        "site": 0,
        "class": 0,
    }
    (opened,) = [e for e in site.fleet.events.own.recent() if e.kind == "incident.opened"]
    assert (opened.data["group"], opened.data["subsumed"]) == ("n1", 1_000)
    assert opened.text == "1000 of 1000 devices of host n1"

    site.clock.now += 10.0
    for slug in dead:
        await site.say(slug)
    site.fleet.verdicts.judge_all()

    kinds = site.kinds()
    assert (kinds["incident.opened"], kinds["incident.updated"], kinds["incident.closed"]) == (
        1,
        0,
        1,
    )
    assert site.fleet.recorder.incidents.open_by_kind()["host"] == 0


async def test_degraded_devices_of_a_host_are_one_incident(site: Site) -> None:
    """Ten devices of one host are alive but their services dead: each is degraded with an event,
    and together they are one incident of the host until the services are back."""
    some = site.add(10, "n1")
    others = site.add(30, "n2")
    for slug in (*some, *others):
        await site.say(slug)
    site.fleet.verdicts.judge_all()
    for state, still_open in ((AgentState.DEGRADED, 1), (AgentState.OK, 0)):
        site.clock.now += 10.0
        for slug in some:
            await site.say(slug, state)
        for _ in range(2):
            site.clock.now += 2.0
            site.fleet.verdicts.judge_all()
        assert site.fleet.recorder.incidents.open_by_kind()["host"] == still_open
    events = list(site.fleet.events.own.recent())
    singles = [event for event in events if event.kind == "verdict.degraded"]
    (opened,) = [event for event in events if event.kind == "incident.opened"]
    assert (len(singles), opened.data["group"], opened.data["subsumed"]) == (10, "n1", 10)
    assert {event.incident for event in singles} == {opened.incident}


async def test_a_verdict_event_carries_its_evidence(site: Site) -> None:
    """The event of an offline device has the report that decided, the placement, and how long the
    state before had lasted."""
    (slug,) = site.add(1, "n1")
    await site.say(slug)
    site.clock.now += 90.0
    await site.say(slug)
    site.clock.now += 10.0

    await site.say(slug, AgentState.OFFLINE)

    event = site.fleet.events.own.of_device(slug)[-1]
    assert event.kind == "verdict.offline"
    assert event.text == "because"
    assert event.data["was"] == "watched"
    assert event.data["was_for_s"] == 100.0
    evidence = event.data["evidence"]
    assert isinstance(evidence, dict)
    assert evidence["placement"] == "running"
    assert evidence["report"] == {
        "age_s": 0.0,
        "state": "offline",
        "ready": True,
        "was_ready": True,
        "misses": 4,
        "confirmed": True,
    }


async def test_a_device_that_beats_is_suspect_and_told_at_once(site: Site) -> None:
    """A heartbeat from an offline device changes the verdict at once, not at the next check; when
    the heartbeat is old and the agent still reports the same, the device is offline again."""
    (slug,) = site.add(1, "n1")
    await site.say(slug, AgentState.OFFLINE)
    assert site.fleet.verdicts.counts()[VerdictState.OFFLINE] == 1

    assert await site.fleet.presence.record_heartbeats([site.fleet.records[slug].device.id]) == [
        True
    ]
    assert site.fleet.verdicts.counts()[VerdictState.SUSPECT] == 1

    site.clock.now += 16.0
    site.fleet.verdicts.judge_all()
    assert site.fleet.verdicts.counts()[VerdictState.OFFLINE] == 1


async def test_starts_are_measured_from_dispatch_to_the_first_ready_report(site: Site) -> None:
    """Forty starts of 4 s give a grace period for their class; a second report, an agent that is
    not ready, a later restart and an unobserved start are not measured."""
    slugs = site.add(40, "n1")
    unseen = site.add(41, "n1")[40]
    for slug in slugs:
        site.fleet.recorder.dispatched(slug, 1)
    site.clock.now += 1.0
    await site.say(slugs[0], ready=False)
    site.clock.now += 3.0
    for slug in (*slugs, unseen):
        await site.say(slug)
    site.clock.now += 500.0
    for slug in slugs:
        await site.say(slug)

    explained = site.fleet.views.explain(slugs[0])

    assert explained["grace"] == {
        "seconds": 15.0,
        "samples": 40,
        "source": "class",
        "dispatched_s_ago": 504.0,
    }
    assert explained["incident"] is None


async def test_a_start_within_the_measured_grace_is_never_more_than_starting(site: Site) -> None:
    """With starts measured at about 40 s, an agent dispatched 100 s ago is still starting, where
    the setting alone (60 s) would make it unwatched."""
    slugs = site.add(61, "n1")
    late = slugs.pop()
    for slug in slugs:
        site.fleet.recorder.dispatched(slug, 1)
    for slug in slugs:
        site.clock.now += 1.0
        await site.say(slug)
    site.fleet.recorder.dispatched(late, 1)
    site.clock.now += 100.0

    assert site.fleet.verdicts.judge(late).state is VerdictState.STARTING
    site.clock.now += 900.0
    assert site.fleet.verdicts.judge(late).state is VerdictState.UNWATCHED


async def test_what_was_open_when_we_died_goes_on_in_the_next_run(
    site: Site, tmp_path: Path
) -> None:
    """After a restart an open incident continues under its id, with the devices that are still bad,
    however many events came after it; it ends once, when they are healthy again."""
    store = EventStore(tmp_path / "events.db")
    await store.open()
    site.fleet.events.own.store = store
    dead = site.add(10, "n1")
    for slug in dead:
        await site.say(slug)
    for slug in dead:
        await site.say(slug, AgentState.OFFLINE)
    site.fleet.verdicts.judge_all()
    (incident,) = site.fleet.recorder.incidents.all()
    for _ in range(3_000):
        site.fleet.events.note(dead[0], "filler", "")
    await store.close()

    for goes_on in (True, False):
        store = EventStore(tmp_path / "events.db")
        found = await store.open()
        again = Site(site.fleet.registry, EventLog(found.origin, store))  # type: ignore[arg-type]
        again.clock.now = site.clock.now + 500.0
        again.fleet.events.own.resume(found.seq, found.events)
        again.fleet.recorder.use_store(store.status, store.left_open)
        dead = again.add(10, "n1")
        for left in again.fleet.recorder.incidents.all():
            age_s = again.fleet.recorder.incidents.serialize(left, str)["first_age_s"]
            assert age_s == pytest.approx(500.0, abs=1.0)
        for wait_s in (30.0, 31.0):
            for slug in dead:
                await again.say(slug, AgentState.OFFLINE if goes_on else AgentState.OK)
            again.clock.now += wait_s
            again.fleet.verdicts.judge_all()
        open_now = [one.id for one in again.fleet.recorder.incidents.all() if one.closed_at is None]
        assert open_now == goes_on * [incident.id]
        for slug in dead:
            await again.say(slug)
        again.fleet.verdicts.judge_all()
        told = [
            e for e in again.fleet.events.after(found.seq, 100)[0] if e.kind.startswith("incident.")
        ]
        ends = [(e.kind, e.incident) for e in told]
        assert ends == goes_on * [("incident.closed", incident.id)]
        await store.close()


async def test_an_incident_of_agents_that_no_node_takes_has_the_reason_of_the_scheduler(
    site: Site,
) -> None:
    """If agents of a class find no node, event and API have the scheduler's reason, and the next
    run continues the incident. If reasons differ, or agents run, there is none."""
    fleet, why = site.fleet, "no node can run it: memory (2 nodes)"
    slugs = site.add(10, "n1")

    def place(state: PlacementState, reason: str) -> None:
        for slug in slugs:
            (one,) = fleet.placements[slug]
            fleet.placements[slug] = (replace(one, state=state, reason=reason, node=""),)

    place(PlacementState.PENDING, why)
    fleet.verdicts.judge_all()
    site.clock.now += fleet.limits.startup_grace_s + 1.0
    fleet.verdicts.judge_all()
    assert fleet.verdicts.judge(slugs[0]).reason.startswith(f"agent pending: {why}; for ")
    (incident,) = fleet.recorder.incidents.all()
    assert fleet.recorder.incidents.serialize(incident, str)["reason"] == why
    (opened,) = [event for event in fleet.events.own.recent() if event.kind == "incident.opened"]
    assert opened.text == f"10 of 10 devices of class default; no agent runs: {why}"

    again = Site(fleet.registry)  # type: ignore[arg-type]
    left = {incident.id: (opened.text, float(opened.at))}
    again.fleet.recorder.use_store(lambda: {"stored": True, "reason": ""}, left)
    (goes_on,) = again.fleet.recorder.incidents.all()
    assert (goes_on.id, goes_on.kind, goes_on.group) == (incident.id, "class", "default")

    place(PlacementState.RUNNING, "")
    fleet.verdicts.judge_all()
    assert fleet.recorder.incidents.serialize(incident, str)["reason"] == ""
    for number, slug in enumerate(slugs):
        (one,) = fleet.placements[slug]
        fleet.placements[slug] = (
            replace(one, state=PlacementState.PENDING, reason=f"reason {number}"),
        )
    fleet.verdicts.judge_all()
    assert fleet.recorder.incidents.serialize(incident, str)["reason"] == ""


async def test_a_store_that_fails_is_an_event_and_a_metric(site: Site) -> None:
    """When the disk fails and when it works again there is one event each, and the metrics
    follow."""
    state: dict[str, object] = {"stored": True, "reason": "", "dropped": 0, "waiting": 0}
    site.fleet.recorder.use_store(lambda: state, {})
    metrics = Metrics()
    for stored, reason, dropped in ((False, "disk is full", 7), (False, "x", 9), (True, "", 9)):
        state |= {"stored": stored, "reason": reason, "dropped": dropped}
        site.fleet.verdicts.judge_all()
        metrics.events(state)

    assert [(e.kind, e.text) for e in site.fleet.events.own.recent()] == [
        ("events.degraded", "disk is full"),
        ("events.stored", "events are stored"),
    ]
    text = metrics.render()
    assert b"nomad_watchdog_events_dropped_total 9.0" in text
    assert b"nomad_watchdog_events_stored 1.0" in text


async def test_devices_that_leave_leave_their_groups(site: Site) -> None:
    """Forgotten and departed devices count in no group, so that the few remaining ones can still be
    an incident."""
    slugs = site.add(20, "n1")
    for slug in slugs:
        await site.say(slug)
    records = dict(site.fleet.records)
    for slug in slugs[4:12]:
        del records[slug]
    for slug in slugs[12:]:
        records[slug] = replace(records[slug], presence=Presence.ABSENT, generation=2, index=2)
    site.fleet.records.reset(records, 3)
    site.fleet.verdicts.judge_all()
    for slug in slugs[:3]:
        await site.say(slug, AgentState.OFFLINE)
    site.fleet.verdicts.judge_all()

    (incident,) = site.fleet.recorder.incidents.all()
    assert (incident.size, incident.count) == (4, 3)
