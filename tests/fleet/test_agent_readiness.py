"""Which agents are certainly not ready: they are replaced by the next version without waiting for
room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nomad_watchdog.model import Epoch, PlacementState
from nomad_watchdog.registry.sqlite import SqliteRegistry
from tests.fleet.test_event_recorder import Site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    yield Site(registry)
    await registry.close()


async def test_an_agent_that_has_had_its_time_is_stuck(site: Site) -> None:
    """An agent that never reported, one that reports not ready after its grace period, and one in a
    crash loop are stuck; within the grace period none of them is."""
    silent, unready, looping = site.add(3, "n")
    site.change(silent, instance="")
    (run,) = site.fleet.placements[looping]
    site.fleet.placements[looping] = (
        replace(run, state=PlacementState.RESTARTING, restarts=9, reason="exit 1"),
    )
    site.fleet.verdicts.judge_all()
    await site.say(unready, ready=False)
    assert [site.fleet.agents.is_stuck(slug) for slug in (silent, unready)] == [False, False]
    site.clock.now += 1_000
    await site.say(unready, ready=False)
    site.fleet.verdicts.judge_all()
    assert all(site.fleet.agents.is_stuck(slug) for slug in (silent, unready, looping))


async def test_an_agent_that_is_only_not_heard_is_not_stuck(site: Site) -> None:
    """An agent that was ready and has fallen silent is unwatched but not stuck: it may be healthy
    and cut off from us. A ready one is not stuck either."""
    cut_off, well = site.add(2, "n")
    for slug in (cut_off, well):
        await site.say(slug)
    site.clock.now += 1_000
    await site.say(well)
    site.fleet.verdicts.judge_all()
    assert site.fleet.verdicts.counts()["unwatched"] == 1  # type: ignore[index]
    assert not any(site.fleet.agents.is_stuck(slug) for slug in (cut_off, well))


async def test_whose_agent_is_being_replaced_is_not_ready_at_once(site: Site) -> None:
    """As soon as an epoch increases, the device counts as one without a ready agent, so that a
    roll-out does not use an outdated verdict."""
    slugs = site.add(3, "n")
    for slug in slugs:
        await site.say(slug)
    assert site.fleet.agents.unready() == 0
    record = site.fleet.records[slugs[0]]
    site.fleet.records.learn([replace(record, epoch=Epoch(record.epoch + 1), instance="", index=2)])
    assert site.fleet.agents.unready() == 1
