"""A few devices move through all schedulers, so that each of the six moves between them is made
once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.demo.stage import BRISK, Stage, StageAgent, open_stage
from tests.e2e.test_migrate import START_S, STOP_S, Watch, move_of, until, verb

pytestmark = [pytest.mark.servers, pytest.mark.busy, pytest.mark.timeout(600)]
NAMES = [f"device-{n}" for n in range(8)]
TOUR = ("nomad", "local", "kubernetes", "nomad", "kubernetes", "local", "nomad")


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    one = SimulatedFleet(network=10, port=free_port())
    yield one
    await one.close()


def doubled(stage: Stage) -> list[str]:
    """Devices with two agent processes at the same time, on any scheduler (S3)."""

    def twice(agents: Iterable[StageAgent]) -> set[str]:
        return {slug for slug, n in Counter(one.slug for one in agents).items() if n > 1}

    first = stage.agents()
    if not twice(first):
        return []
    # /proc is not read atomically: a process that has ended meanwhile may never have run beside the
    # other.
    alive = {one.pid for one in stage.agents()}
    return sorted(twice(one for one in first if one.pid in alive))


async def test_each_pair_of_schedulers_moves_a_fleet(tmp_path: Path, fleet: SimulatedFleet) -> None:
    """After each leg every device is watched and has one agent, a process of the target scheduler.
    On the way no device has two accepted agents or two processes, or is called offline."""
    async with open_stage("nomad", tmp_path, fleet.port, beside=True, pace=BRISK) as stage:
        watch = Watch(stage)

        async def look_for_two() -> None:
            while True:
                watch.wrong += [f"S3: two agents of {slug} at once" for slug in doubled(stage)]
                await asyncio.sleep(0.3)

        async def settled(where: str) -> bool:
            verdicts = [item["verdict"] for item in await stage.items()]
            homes = [one.backend for one in stage.agents()]
            return verdicts == ["watched"] * len(NAMES) and homes == [where] * len(NAMES)

        for name in NAMES:
            await fleet.add(name)
        await stage.register({name: fleet.devices[name].address for name in NAMES})
        await until("all come up", 120.0, lambda: settled("nomad"))
        watching = asyncio.gather(watch.run(), look_for_two())
        try:
            before = {item["id"]: item["epoch"] for item in await stage.items()}
            for source, goal in zip(TOUR, TOUR[1:], strict=False):
                await verb(stage, "migrate", "--from", source, "--to", goal)
                await until(f"{source} to {goal}", 120.0, lambda: done(stage))
                await until(f"all are watched on {goal}", 60.0, lambda to=goal: settled(to))
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        after = {item["id"]: item["epoch"] for item in await stage.items()}
    assert watch.wrong == [], watch.wrong[:10]
    assert all(after[name] >= before[name] + len(TOUR) - 1 for name in NAMES)
    assert 0 < max(watch.gaps) <= STOP_S + START_S, sorted(watch.gaps)[-5:]


async def done(stage: Stage) -> bool:
    return (await move_of(stage))["state"] == "done"
