"""Which agents read the pressure of their hosts, and what is known of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nomad_watchdog.api.schemas import ReplicatedReportsIn
from nomad_watchdog.fleet import host_pressures
from nomad_watchdog.fleet.host_pressures import CHOOSE_EVERY_S, READERS, UNREADABLE_S
from nomad_watchdog.fleet.hosts import HostWatcher
from nomad_watchdog.host_pressure import HostPressure, Resource, Stall
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Epoch, PlacementState, Presence
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.report_replication import document
from nomad_watchdog.schedulers import ClosedHost
from tests.fleet.test_event_recorder import Site

LOADED = HostPressure(Stall(1.0, 2.0), Stall(30.0, 40.0), Stall(0.0, 0.5))
BLIND = HostPressure(unreadable="/proc/pressure/io: Permission denied")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    yield Site(registry)
    await registry.close()


def readers(site: Site, slugs: list[Slug]) -> list[Slug]:
    site.clock.now += CHOOSE_EVERY_S
    return [slug for slug in slugs if site.fleet.pressures.asks(slug)]


async def test_three_agents_per_host_are_asked_and_always_the_same(site: Site) -> None:
    """Of each host the present devices with the lowest hashes are asked, at each choice the same ones. A device that
    left, or whose agent does not run, is replaced by the next one."""
    slugs = site.add(20, "north") + site.add(2, "south")
    asked = readers(site, slugs)
    hashes = sorted(slug[-20:] for slug in slugs[:20])
    assert {slug[-20:] for slug in asked[:READERS]} == set(hashes[:READERS])
    assert asked[READERS:] == slugs[20:]
    assert readers(site, slugs) == asked
    site.change(asked[0], presence=Presence.ABSENT)
    (run,) = site.fleet.placements[asked[1]]
    site.fleet.placements[asked[1]] = (replace(run, state=PlacementState.RESTARTING),)
    site.change(asked[2], epoch=Epoch(9))
    assert {slug[-20:] for slug in readers(site, slugs[:20])} == set(hashes[READERS : 2 * READERS])


async def test_the_newest_reading_of_a_host_counts_until_it_is_stale(site: Site) -> None:
    """A reading belongs to the host of its agent's placement, the newest one counts, and after `report_stale` the
    pressure is unknown again."""
    first, second = site.add(2, "north")
    fleet = site.fleet
    await site.say(first, pressure=LOADED)
    await site.say(second, pressure=replace(LOADED, cpu=None, unreadable="x"))
    (row,) = fleet.hosts.rows()
    assert (row.name, row.agents, row.state, row.age_s) == ("north", 2, "open", 0.0)
    assert row.pressure is not None
    assert (row.pressure.cpu, row.pressure.of(Resource.MEMORY)) == (None, Stall(30.0, 40.0))
    assert row.unreadable == "x"
    assert list(fleet.hosts.ratios()) == [
        ("north", Resource.MEMORY, 0.4),
        ("north", Resource.IO, 0.005),
    ]
    site.clock.now += fleet.limits.report_stale_s + 1
    (row,) = fleet.hosts.rows()
    assert (row.pressure, row.unreadable) == (None, "")
    assert row.age_s == fleet.limits.report_stale_s + 1
    assert not list(fleet.hosts.ratios())


async def test_an_agent_that_can_read_nothing_states_it_once(site: Site) -> None:
    """After it has stated why, it is asked no more for an hour; the reason is shown as long, and a reading of another
    agent on the host counts."""
    slugs = site.add(3, "north")
    assert readers(site, slugs) == slugs
    await site.say(slugs[0], pressure=BLIND)
    assert readers(site, slugs) == slugs[1:]
    site.clock.now += UNREADABLE_S / 2
    (row,) = site.fleet.hosts.rows()
    assert (row.pressure, row.unreadable) == (None, BLIND.unreadable)
    await site.say(slugs[1], pressure=LOADED)
    await site.say(slugs[0], pressure=BLIND)
    (row,) = site.fleet.hosts.rows()
    assert (row.pressure, row.unreadable) == (LOADED, "")
    site.clock.now += UNREADABLE_S
    assert readers(site, slugs) == slugs


async def test_a_replica_learns_the_readings_of_the_others(site: Site, tmp_path: Path) -> None:
    """A report with a reading that one replica sends is accepted by another one with the same reading."""
    (slug,) = site.add(1, "north")
    sent = []
    site.fleet.reports.accepted.connect(sent.append)
    await site.say(slug, pressure=LOADED)
    registry = SqliteRegistry(path=tmp_path / "other.db")
    await registry.initialise()
    other = Site(registry)
    other.add(1, "north")
    body = ReplicatedReportsIn.model_validate_json(json.dumps({"reports": [document(sent[0])]}))
    assert other.fleet.reports.accept_replicated(body.reports[0].report())
    assert [row.pressure for row in other.fleet.hosts.rows()] == [LOADED]
    await registry.close()


async def test_hosts_without_agents_are_forgotten_and_their_number_is_bounded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host on which no agent runs has no reading, and readings of more hosts than the maximum are discarded."""
    monkeypatch.setattr(host_pressures, "MAX_HOSTS", 2)
    slugs = [slug for host in ("a", "b", "c") for slug in site.add(1, host)]
    for slug in slugs:
        await site.say(slug, pressure=LOADED)
    assert site.fleet.pressures.hosts() == ["a", "b"]
    del site.fleet.placements[slugs[0]]
    readers(site, slugs)
    assert site.fleet.pressures.hosts() == ["b"]


async def test_closed_hosts_are_listed_and_metrics_follow_the_readings(site: Site) -> None:
    """A closed host is listed with its state, also without agents. The metric has a series per fresh reading."""
    (slug,) = site.add(1, "north")
    HostWatcher(site.fleet).seen({"south": ClosedHost(True, "draining")})
    assert [(row.name, row.agents, row.state) for row in site.fleet.hosts.rows()] == [
        ("north", 1, "open"),
        ("south", 0, "draining"),
    ]
    metrics = Metrics()
    metrics.hosts.ratios = site.fleet.hosts.ratios
    await site.say(slug, pressure=LOADED)
    series = b'nomad_watchdog_host_pressure_ratio{host="north",resource="memory"} 0.4'
    assert series in metrics.render()
    site.clock.now += 1_000
    assert b"host_pressure_ratio{" not in metrics.render()
