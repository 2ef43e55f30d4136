"""Devices behind one gateway, as the control plane sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nomad_watchdog.api.schemas import ReportIn
from nomad_watchdog.core.incidents import GroupKind
from nomad_watchdog.model import AgentState, VerdictState
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.report_replication import document
from tests.fleet.test_event_recorder import Site

BEHIND = {"gateway": "10.0.0.1", "reason": "gateway 10.0.0.1 does not answer"}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    yield Site(registry)
    await registry.close()


async def test_twelve_devices_behind_a_dead_gateway_are_one_incident(site: Site) -> None:
    """Twelve of a host's hundred devices, all behind one dead gateway, are one incident of that
    gateway; none of them is offline, each gives the reason, and the event names the gateway as
    dead."""
    slugs = site.add(100, "n1")
    for number, slug in enumerate(slugs):
        await site.say(slug, **({"gateway": "10.0.0.1"} if number < 12 else {}))
    site.fleet.verdicts.judge_all()
    site.clock.now += 10.0
    for slug in slugs[:12]:
        await site.say(slug, AgentState.SUSPECT, gateway_dead=True, **BEHIND)
    site.clock.now += 2.0
    site.fleet.verdicts.judge_all()

    (incident,) = site.fleet.recorder.incidents.all()
    assert (incident.kind, incident.group) == (GroupKind.GATEWAY, "10.0.0.1")
    assert (incident.count, incident.size) == (12, 12)
    told = [e for e in site.fleet.events.own.recent() if e.kind == "verdict.suspect"]
    assert {e.text for e in told} == {BEHIND["reason"]}
    assert {e.data["evidence"]["report"]["gateway_dead"] for e in told} == {"10.0.0.1"}
    assert not [e for e in site.fleet.events.own.recent() if e.kind == "verdict.offline"]
    views = [site.fleet.views.device(slug) for slug in slugs[:12]]
    assert {view.verdict.state for view in views if view} == {VerdictState.SUSPECT}


async def test_what_one_replica_tells_another_keeps_the_gateway(site: Site) -> None:
    """A report with a gateway passes the schemas of the API and of a peer unchanged; one without is
    from an older agent, and is accepted."""
    slugs = site.add(1, "n1")
    heard = []
    site.fleet.reports.accepted.connect(heard.append)
    await site.say(slugs[0], AgentState.SUSPECT, gateway_dead=True, **BEHIND)
    said = document(heard[0])

    assert ReportIn.model_validate(said).report() == heard[0]
    del said["gateway"], said["gateway_dead"]
    older = ReportIn.model_validate(said).report()
    assert (older.gateway, older.gateway_dead) == ("", False)
