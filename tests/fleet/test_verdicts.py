"""When devices are judged for readers of their verdicts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from nomad_watchdog.fleet.verdicts import FRESH_S
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import VerdictState
from nomad_watchdog.registry.sqlite import SqliteRegistry
from tests.fleet.test_event_recorder import Site


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    yield Site(registry)
    await registry.close()


async def test_a_reader_sees_a_verdict_of_the_last_two_seconds(site: Site) -> None:
    """A view judges nothing by itself. A refresh judges once per FRESH_S, and at once after a
    change of the record; an unknown device is ignored."""
    (slug,) = site.add(1, "n")
    await site.say(slug)
    verdicts = site.fleet.verdicts

    def seen() -> VerdictState:
        view = site.fleet.views.device(slug)
        assert view is not None
        return view.verdict.state

    assert seen() is VerdictState.WATCHED
    site.clock.now += FRESH_S / 2
    site.fleet.apply_placements({})
    verdicts.refresh(slug)
    assert seen() is VerdictState.WATCHED, "judged a moment ago"
    site.clock.now += FRESH_S
    assert seen() is VerdictState.WATCHED, "a view judges nothing"
    verdicts.refresh(slug)
    assert seen() is not VerdictState.WATCHED
    before = verdicts.track_of(slug)
    assert before is not None
    judged = before.judged
    site.change(slug, instance="another")
    verdicts.refresh(slug)
    assert before.judged != judged, "its record has changed"
    verdicts.refresh(Slug("d-unknown"))
    assert verdicts.track_of(Slug("d-unknown")) is None
