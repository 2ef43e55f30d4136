"""Agents that are started, silent, refused or restarted: the states shown and the events
published."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nomad_watchdog.core import presence
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    Condition,
    ConditionState,
    Departure,
    Epoch,
    PlacementState,
    Presence,
    PresenceRules,
    Unheard,
    VerdictState,
    WallTime,
)
from nomad_watchdog.registry.sqlite import SqliteRegistry
from tests.fixed_loop import FixedLoop
from tests.fleet.test_event_recorder import Site

NO_NODE = "no node can run it: 1 node is not eligible"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    yield Site(registry)
    await registry.close()


def place(site: Site, slug: Slug, state: PlacementState, **changes: object) -> None:
    """Set the state of the device's placement."""
    (found,) = site.fleet.placements[slug]
    site.fleet.placements[slug] = (replace(found, state=state, **changes),)  # type: ignore[arg-type]


def judge(site: Site, slug: Slug, seconds: int = 0) -> list[VerdictState]:
    """The states of the device now and within this many seconds."""
    states = [site.fleet.verdicts.judge(slug).state]
    for _ in range(seconds):
        site.clock.now += 1.0
        site.fleet.verdicts.judge_all()
        states.append(site.fleet.verdicts.judge(slug).state)
    return states


def texts(site: Site, kind: str) -> list[str]:
    return [event.text for event in site.fleet.events.own.recent() if event.kind == kind]


def begin_anew(site: Site, slug: Slug) -> None:
    """The device gets the next epoch, whose agent waits for a node."""
    record = site.fleet.records[slug]
    epoch = Epoch(record.epoch + 1)
    site.change(slug, epoch=epoch, instance="")
    place(site, slug, PlacementState.PENDING, epoch=epoch, instances=(), node="", queued=True)


async def test_an_agent_that_waited_for_a_node_is_not_silent_when_it_starts(site: Site) -> None:
    """Drained, 75 s without a node, then started: no silence is reported until the agent has run
    for `report_stale`. Then it is, and `agent.heard` reports that a report has arrived."""
    (slug,) = site.add(1, "n")
    await site.say(slug)
    begin_anew(site, slug)
    judge(site, slug, 75)
    place(site, slug, PlacementState.RUNNING, instances=("j",), queued=False)
    judge(site, slug, 44)
    assert texts(site, "agent.unheard") == []
    judge(site, slug, 2)
    (silent,) = texts(site, "agent.unheard")
    assert silent.startswith(
        "no report has reached this control plane for 46 s although the agent runs"
    )
    site.change(slug, instance="j")
    await site.say(slug, ready=False)
    (heard,) = texts(site, "agent.heard")
    assert heard.startswith("a report has reached this control plane: the agent is not ready yet")


@pytest.mark.parametrize("every_s", [5, 30])
async def test_restarts_make_no_silence_healthy(site: Site, every_s: int) -> None:
    """An agent that the scheduler reports ready, restarts again and again and never reports is not
    watched for longer than `report_stale`."""
    (slug,) = site.add(1, "n")
    seen = []
    for number in range(1, 200 // every_s):
        place(site, slug, PlacementState.RUNNING, ready=True, restarts=number)
        seen += judge(site, slug, every_s)
    assert VerdictState.WATCHED not in seen[70:]


async def test_a_silence_that_ends_without_a_report_says_so(site: Site) -> None:
    """If the agent is stopped while it is silent, the event does not claim a report."""
    (slug,) = site.add(1, "n")
    await site.say(slug)
    judge(site, slug, 50)
    assert len(texts(site, "agent.unheard")) == 1
    place(site, slug, PlacementState.STOPPING)
    judge(site, slug)
    (over,) = texts(site, "agent.heard")
    assert over.startswith("no report is expected now: ")


@pytest.mark.parametrize("gap_s", [0, 1, 3])
async def test_a_watched_device_whose_agent_finds_no_node_is_unwatched_once(
    site: Site, gap_s: int
) -> None:
    """If the only node is drained, the device is unwatched with the scheduler's reason from the
    start, and not `starting` in between, however long the scheduler takes; it is `starting` once a
    node takes the agent."""
    (slug,) = site.add(1, "n")
    await site.say(slug)
    site.fleet.attach(FixedLoop(obstacle=lambda _slug: "10 agents wait for a node"))
    kept = site.fleet.placements.pop(slug)
    judge(site, slug, 1)
    site.fleet.attach(FixedLoop())
    judge(site, slug, 1)
    site.fleet.placements[slug] = kept
    begin_anew(site, slug)
    judge(site, slug, gap_s)
    place(site, slug, PlacementState.PENDING, reason=NO_NODE)
    states = judge(site, slug, 90)
    assert set(states) == {VerdictState.UNWATCHED}
    kinds = [
        event.kind for event in site.fleet.events.own.recent() if event.kind.startswith("verdict")
    ]
    assert kinds == ["verdict.watched", "verdict.unwatched"]
    assert NO_NODE in site.fleet.verdicts.judge(slug).reason
    view = site.fleet.views.device(slug)
    assert view is not None
    assert view.since_s >= 90
    place(site, slug, PlacementState.RUNNING, instances=("j",), queued=False, reason="")
    site.change(slug, instance="j")
    await site.say(slug)
    assert judge(site, slug) == [VerdictState.WATCHED]


async def test_a_new_device_and_an_agent_that_moves_are_starting(site: Site) -> None:
    """A device that was never watched has its grace period while it waits for a node; so has a
    watched one whose new agent has not been placed for a moment."""
    new, moved = site.add(2, "n")
    await site.say(moved)
    for slug in (new, moved):
        begin_anew(site, slug)
    place(site, new, PlacementState.PENDING, reason=NO_NODE)
    assert set(judge(site, new, 30)) == {VerdictState.STARTING}
    assert judge(site, moved) == [VerdictState.STARTING]


async def test_a_restarted_agent_is_one_event_and_a_loop_is_few(site: Site) -> None:
    """A single kill is one event with the scheduler's reason. Repeated restarts are at most one
    event per minute, which counts the others. Restarts before this control plane started, or of
    another placement, are not reported."""
    (slug,) = site.add(1, "n")
    place(site, slug, PlacementState.RUNNING, restarts=7)
    await site.say(slug)
    place(site, slug, PlacementState.RESTARTING, restarts=7, reason="killed by signal 9")
    judge(site, slug, 2)
    assert texts(site, "agent.restarted") == []
    place(site, slug, PlacementState.RUNNING, restarts=8, reason="")
    judge(site, slug, 2)
    assert texts(site, "agent.restarted") == [
        "the scheduler restarted the agent (restart 8 of its placement): killed by signal 9"
    ]
    for number in range(9, 69):
        place(site, slug, PlacementState.RUNNING, restarts=number)
        judge(site, slug, 2)
    judge(site, slug, 60)
    told = texts(site, "agent.restarted")
    assert 3 <= len(told) <= 4
    assert "(restart 68 of its placement" in told[-1]
    assert [one for one in told if "times since the last event)" in one]
    assert "signal 9" not in "".join(told[1:]), "the reason of an earlier restart"
    begin_anew(site, slug)
    place(site, slug, PlacementState.RUNNING, restarts=0, instances=("j",))
    judge(site, slug, 100)
    assert texts(site, "agent.restarted") == told


async def test_refused_reports_count_at_once_and_decide_nothing_alone(site: Site) -> None:
    """The first refusal from the agent's address counts; the verdict waits for `report_stale`, as
    the content of a refused report is not verified. One from another address, or of another epoch,
    does not count; an accepted one ends the silence."""
    here, elsewhere, older = site.add(3, "n")
    for slug in (here, elsewhere, older):
        await site.say(slug, listen="10.0.0.7:8080")
    site.fleet.reports.refused(401, here, Epoch(1), peer="10.0.0.7")
    site.fleet.reports.refused(401, elsewhere, Epoch(1), peer="10.0.0.8")
    site.fleet.reports.refused(401, older, Epoch(0), peer="10.0.0.7")
    assert site.fleet.verdicts.unheard()[Unheard.REFUSED] == 1
    assert site.fleet.views.status()["unheard"] == {"silent": 0, "refused": 1}
    assert "401" in site.fleet.verdicts.refused(here)
    assert judge(site, here) == [VerdictState.WATCHED]
    await site.say(here)
    assert site.fleet.verdicts.unheard()[Unheard.REFUSED] == 0
    site.fleet.reports.refused(401, here, Epoch(1), peer="10.0.0.7")
    for slug in (elsewhere, older):
        await site.say(slug)
    assert judge(site, here, 46)[-1] is VerdictState.UNWATCHED
    assert site.fleet.verdicts.unheard()[Unheard.REFUSED] >= 1
    assert site.fleet.verdicts.refused(here) == ""


@pytest.mark.parametrize("left", [Departure.EXPIRED, Departure.DISCONNECTED])
async def test_nothing_is_kept_where_there_is_no_agent(site: Site, left: Departure) -> None:
    """A control plane that starts restarts the grace period of a device that left long ago: without
    an agent nothing is kept, with one it is."""
    gone, there = site.add(2, "n")
    site.fleet.placements.pop(gone)
    site.fleet.presence.heartbeats.rules = PresenceRules(grace_s=30.0)
    records = {
        slug: replace(record, presence=Presence.ABSENT, left=left, index=2)
        for slug, record in site.fleet.records.items()
    }
    site.fleet.records.reset(records, 2)
    kept = {slug: site.fleet.presence.explain(slug)["attendance"] for slug in (gone, there)}
    assert kept[gone]["agent_kept"] == ""  # type: ignore[index]
    assert "its agent waits" in kept[there]["agent_kept"]  # type: ignore[index]
    assert site.fleet.verdicts.judge(gone).reason == "the device has left"
    place(site, there, PlacementState.DEAD)
    assert site.fleet.presence.kept_for(there) == ""


@pytest.mark.parametrize("ill", [True, False])
async def test_the_expiry_of_a_dead_device_names_its_outage(site: Site, ill: bool) -> None:
    """A device with a ttl dies and expires: the event says that it was offline, and why. For a
    healthy device it does not."""
    (slug,) = site.add(1, "n")
    site.fleet.records.loaded = True
    record = site.fleet.records[slug]
    if ill:
        dead = Condition(ConditionState.OFFLINE, WallTime(5.0), "tcp:80: no answer", 4)
        site.fleet.records.learn([replace(record, condition=dead, index=2)])
    gone = presence.deregister(site.fleet.records[slug], WallTime(9.0), Departure.EXPIRED)
    assert gone is not None
    site.fleet.records.learn([replace(gone, index=3)])
    (told,) = texts(site, "expired")
    assert told.endswith("; it was offline: tcp:80: no answer") is ill
