"""Real input: a few devices go round all schedulers, so that each of the six moves between them is made once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from nomad_watchdog.demo.fleet import SimulatedFleet
from nomad_watchdog.demo.stage import BRISK, Stage, open_stage
from nomad_watchdog.dev._kubelet_spec import MARK
from nomad_watchdog.dev.process import free_port

from .test_migrate import START_S, STOP_S, Watch, move_of, until, verb

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]
NAMES = [f"device-{n}" for n in range(8)]
TOUR = ("nomad", "local", "kubernetes", "nomad", "kubernetes", "local", "nomad")


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    one = SimulatedFleet(network=10, port=free_port())
    yield one
    await one.close()


def home(pid: int) -> str:
    """Which scheduler a process is of, by what only that one gives it."""
    environ = Path(f"/proc/{pid}/environ").read_bytes()
    if MARK.encode() in environ:
        return "kubernetes"
    return "nomad" if b"NOMAD_ALLOC_ID" in environ else "local"


async def test_each_pair_of_schedulers_moves_a_fleet(tmp_path: Path, fleet: SimulatedFleet) -> None:
    """After each leg every device has one agent, a process of the scheduler that it went to, and is watched; on
    the way nobody has two accepted agents or two processes, or is called offline."""
    async with open_stage("nomad", tmp_path, fleet.port, beside=True, pace=BRISK) as stage:
        watch = Watch(stage)

        async def settled(where: str) -> bool:
            counts = [item["verdict"] for item in await stage.items()]
            homes = {slug: home(pid) for slug, pid in stage.agent_pids().items()}
            return counts == ["watched"] * len(NAMES) and list(homes.values()) == [where] * len(
                NAMES
            )

        watching = asyncio.ensure_future(watch.run())
        try:
            for name in NAMES:
                await fleet.add(name)
            await stage.register({name: fleet.devices[name].address for name in NAMES})
            await until("all come up", 120.0, lambda: settled("nomad"))
            watch.gaps.clear()
            for source, goal in zip(TOUR, TOUR[1:], strict=False):
                await verb(stage, "migrate", "--from", source, "--to", goal)
                await until(f"{source} to {goal}", 120.0, lambda: done(stage))
                await until(f"all are watched on {goal}", 60.0, lambda to=goal: settled(to))
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            for pid in stage.agent_pids().values():
                if home(pid) == "local":  # these outlive their reconciler on purpose
                    os.kill(pid, signal.SIGKILL)
    assert watch.wrong == [], watch.wrong[:10]
    assert len(watch.gaps) == len(NAMES) * (len(TOUR) - 1)
    assert max(watch.gaps) <= STOP_S + START_S, sorted(watch.gaps)[-5:]


async def done(stage: Stage) -> bool:
    return (await move_of(stage))["state"] == "done"
