"""The conformance suite, unchanged, over the fake scheduler: what is proved on the fake holds for
real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec, Placement
from nomad_watchdog.testing.conformance import CHECKS, Rig, check_scheduler
from tests.simulation.cluster import FAILS
from tests.simulation.fakes import Cluster, FakeScheduler


@asynccontextmanager
async def fake_rig() -> AsyncIterator[Rig]:
    cluster = Cluster()

    def spec(**overrides: Any) -> AgentSpec:
        return replace(AgentSpec(agent_class="default", version="1", spec_hash="h1"), **overrides)

    async def processes(slug: Slug) -> set[int]:
        return {process.pid for process in cluster.alive(slug)}

    async def crash(placement: Placement) -> None:
        for process in cluster.alive(placement.slug):
            cluster.exit(process, 137)

    @asynccontextmanager
    async def break_reads() -> AsyncIterator[None]:
        cluster.broken = True
        try:
            yield
        finally:
            cluster.broken = False

    yield Rig(
        scheduler=lambda: FakeScheduler(cluster),
        spec=spec,
        failing_spec=lambda: spec(spec_hash="f", variables={FAILS: "1"}),
        scale_spec=spec,
        processes=processes,
        crash=crash,
        break_reads=break_reads,
        timeout_s=30.0,
    )


@pytest.mark.parametrize("name", list(CHECKS))
async def test_conformance(name: str) -> None:
    """The fake scheduler passes every check of the interface."""
    async with fake_rig() as rig:
        await CHECKS[name](rig)


async def test_the_whole_suite_as_a_third_party_runs_it() -> None:
    """`check_scheduler` itself passes with the fake and runs every check."""
    assert await check_scheduler(fake_rig, hostile_ids=50) == list(CHECKS)
