"""Local schedulers for tests, with cleanup of everything they start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec, Placement, PlacementState
from nomad_watchdog.schedulers.local import LocalScheduler, process
from nomad_watchdog.testing.conformance import CHECKS, Rig, hostile_ids_map_back
from servers.ready import pause_s

FEW = 60
"""Number of hostile ids placed when the long tests are skipped: two of each kind."""
CHECKS_BY_LENGTH = [
    pytest.param(name, marks=pytest.mark.long) if check is hostile_ids_map_back else name
    for name, check in CHECKS.items()
]
"""For `parametrize`: all names; the check that places a thousand devices is marked long."""


def local_spec(*command: str, **overrides: Any) -> AgentSpec:
    variables = {"command": json.dumps(list(command or ("sleep", "600")))}
    spec = AgentSpec(agent_class="default", version="1", spec_hash="h1", variables=variables)
    return replace(spec, **overrides)


def pids_of(directory: Path, slug: str = "") -> set[int]:
    """Live processes whose state directory is below this one, found by their environment or, if a
    nursery forked them, by the lock that they hold."""
    lock = str(directory / slug / "lock")
    wanted = f"WATCHDOG_STATE_DIR={directory / slug}".encode()
    found = set()
    for one in Path("/proc").iterdir():
        if not one.name.isdigit():
            continue
        with suppress(OSError):
            words = (one / "environ").read_bytes().split(b"\0")
            ours = any(
                w == wanted + b"/state" or (not slug and w.startswith(wanted)) for w in words
            )
            if not ours:
                held = str((one / "fd" / "3").readlink())
                below = held.startswith(f"{directory}/") and held.endswith("/lock")
                ours = held == lock if slug else below
            if ours and process.start_time(int(one.name)):
                found.add(int(one.name))
    return found


def agent_spec(**overrides: Any) -> AgentSpec:
    """A spec of the real agent, for a device that does not exist."""
    config = {
        "v": 1,
        "probes": [{"kind": "tcp", "port": 9, "interval_s": 30.0}],
        **overrides.pop("config", {}),
    }
    spec = AgentSpec(agent_class="default", version="1", spec_hash="h1", agent_config=config)
    return replace(spec, **overrides)


async def eventually(test: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """Poll until the result is true, and return it."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        found = test()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        waited_s = loop.time() - began
        assert waited_s < timeout_s, "not in time"
        await asyncio.sleep(pause_s(waited_s))


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """The agents' directory; processes left in it are killed, and our dead children are reaped."""
    where = tmp_path / "agents"
    yield where
    for pid in pids_of(where):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break


@asynccontextmanager
async def local_rig(directory: Path, *, fork: bool | None = None) -> AsyncIterator[Rig]:
    """`fork`: run the real agent, forked or spawned; None = run a plain command instead."""

    async def processes(slug: Slug) -> set[int]:
        return await asyncio.to_thread(pids_of, directory, slug)

    async def crash(placement: Placement) -> None:
        for pid in await processes(placement.slug):
            os.kill(pid, signal.SIGKILL)

    @asynccontextmanager
    async def break_reads() -> AsyncIterator[None]:
        aside = directory.with_name("aside")
        directory.rename(aside)
        try:
            yield
        finally:
            aside.rename(directory)

    def scheduler() -> LocalScheduler:
        return LocalScheduler(
            directory=directory, backoff_initial_s=0.2, poll_s=0.2, fork=fork is not False
        )

    def failing_spec() -> AgentSpec:
        if fork is None:
            return local_spec(sys.executable, "-c", "raise SystemExit(1)")
        return agent_spec(config={"probes": []})

    yield Rig(
        scheduler=scheduler,
        spec=local_spec if fork is None else agent_spec,
        failing_spec=failing_spec,
        scale_spec=local_spec if fork is None else agent_spec,
        processes=processes,
        crash=crash,
        break_reads=break_reads,
        timeout_s=20.0,
    )


async def adopted_tended_and_retired(
    heir: LocalScheduler, directory: Path, before: set[int]
) -> None:
    """The successor finds the five agents of a dead owner, replaces one that is killed, and retires
    all."""
    try:
        seen = (await heir.snapshot()).placements
        assert {one.state for (one,) in seen.values()} == {PlacementState.RUNNING}
        assert pids_of(directory) == before
        os.kill(min(before), signal.SIGKILL)
        await eventually(lambda: len(pids_of(directory)) == 5 and pids_of(directory) != before)
        for (one,) in (await heir.snapshot()).placements.values():
            await heir.retire(one, 5.0)
        await eventually(lambda: not pids_of(directory))
    finally:
        await heir.close()
