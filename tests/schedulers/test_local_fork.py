"""Forked agents behave like spawned ones, whichever process dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.model import Epoch, PlacementState
from nomad_watchdog.schedulers.local import LocalScheduler, process
from nomad_watchdog.schedulers.local._zygote import Parents
from nomad_watchdog.schedulers.local.files import read_entry, write_entry
from nomad_watchdog.testing.conformance import record_of
from tests.schedulers.conftest import adopted_tended_and_retired, agent_spec, eventually, pids_of

RECORD = record_of("crane-7")
OWNER = """
import asyncio, sys
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers.local import LocalScheduler
from nomad_watchdog.testing.conformance import record_of
async def main():
    config = {"v": 1, "probes": [{"kind": "tcp", "port": 9, "interval_s": 30.0}]}
    spec = AgentSpec(agent_class="default", version="1", spec_hash="h1", agent_config=config)
    scheduler = LocalScheduler(directory=sys.argv[1], poll_s=0.1)
    for number in range(5):
        await scheduler.ensure(record_of(f"crane-{number}"), Epoch(1), spec)
    print("placed", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def scheduler(directory: Path, **changes: Any) -> LocalScheduler:
    return LocalScheduler(directory=directory, backoff_initial_s=0.1, poll_s=0.1, **changes)


def parent_of(directory: Path) -> int:
    """The process that forked the device's agent, as recorded in its file."""
    entry = read_entry(directory / RECORD.slug)
    assert entry is not None
    return entry.parent


async def forked(directory: Path, count: int = 1) -> set[int]:
    """The pids of this many agents; a fork gets its own descriptors a moment after it was
    reported."""
    await eventually(lambda: len(pids_of(directory)) == count)
    return pids_of(directory)


async def state_of(ours: LocalScheduler) -> PlacementState:
    (one,) = (await ours.snapshot()).placements[RECORD.slug]
    return one.state


async def test_an_agent_is_forked_with_all_that_a_spawned_one_has(directory: Path) -> None:
    """A forked agent leads its own session, and has the null device, its log and its lock, and
    nothing else."""
    ours = scheduler(directory)
    try:
        await ours.ensure(RECORD, Epoch(1), agent_spec())
        (pid,) = await forked(directory)
        home = directory / RECORD.slug
        log = home / "agent.log"
        await eventually(lambda: "agent started" in log.read_text())
        assert parent_of(directory) not in (0, os.getpid())
        assert os.getsid(pid) == pid
        links = {int(fd.name): str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        assert [links[n] for n in range(4)] == [
            os.devnull,
            str(log),
            str(log),
            str(home / "lock"),
        ]
        assert sum(link.startswith("socket:") for link in links.values()) <= 2, links
        assert log.stat().st_mode & 0o777 == 0o600
        assert Path(f"/proc/{pid}/comm").read_text().strip() == RECORD.slug[:15]
        told = json.loads((home / "state" / "agent.json").read_text())
        entry = read_entry(home)
        assert entry is not None
        assert (told["pid"], told["instance"]) == (pid, entry.instance)
    finally:
        await ours.close()


async def test_l3_killed_owner_leaves_forked_agents_and_the_next_adopts_them(
    directory: Path,
) -> None:
    """kill -9 of the owner ends its nursery but no agent; the next owner adopts the agents."""
    first = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(directory), stdout=asyncio.subprocess.PIPE
    )
    assert first.stdout is not None
    async with asyncio.timeout(20):
        assert await first.stdout.readline() == b"placed\n"
    before = await forked(directory, 5)
    entry = read_entry(directory / record_of("crane-0").slug)
    assert entry is not None
    first.kill()
    await first.communicate()
    await eventually(lambda: not process.is_same(entry.parent, entry.parent_start))
    await adopted_tended_and_retired(scheduler(directory), directory, before)


async def test_l3_killed_nursery_leaves_its_agents_and_another_takes_over(directory: Path) -> None:
    """kill -9 of the nursery stops no agent; an agent that dies later is noticed, and forked by a
    new nursery."""
    ours = scheduler(directory)
    try:
        await ours.ensure(RECORD, Epoch(1), agent_spec())
        nursery = parent_of(directory)
        before = await forked(directory)
        os.kill(nursery, signal.SIGKILL)
        await eventually(lambda: process.start_time(nursery) == 0)
        assert pids_of(directory) == before
        assert await state_of(ours) is PlacementState.RUNNING
        os.kill(min(before), signal.SIGKILL)
        await eventually(lambda: len(pids_of(directory)) == 1 and pids_of(directory) != before)
        await eventually(lambda: parent_of(directory) not in (0, nursery))
        assert parent_of(directory) != os.getpid()
    finally:
        await ours.close()


async def test_hung_nursery_is_killed_and_costs_no_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nursery that stops answering is abandoned: the next agent is spawned, the one after that is
    forked by a new nursery."""
    monkeypatch.setattr("nomad_watchdog.schedulers.local._zygote._ANSWER_S", 0.3)
    ours = scheduler(directory)
    try:
        await ours.ensure(record_of("crane-1"), Epoch(1), agent_spec())
        entry = read_entry(directory / record_of("crane-1").slug)
        assert entry is not None
        os.kill(entry.parent, signal.SIGSTOP)
        await ours.ensure(RECORD, Epoch(1), agent_spec())
        await eventually(lambda: len(pids_of(directory)) == 2)
        third = record_of("crane-3")
        await ours.ensure(third, Epoch(1), agent_spec())
        await eventually(lambda: len(pids_of(directory)) == 3)
        assert process.start_time(entry.parent) == 0
        last = read_entry(directory / third.slug)
        assert last is not None
        assert last.parent not in (0, os.getpid(), entry.parent)
    finally:
        await ours.close()


async def test_no_nursery_means_spawned_agents(directory: Path) -> None:
    """If no nursery can be started, agents are plain child processes."""
    broken = directory.parent / "python"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *zygote*) exit 1;; *) exec {sys.executable} "$@";; esac\n'
    )
    broken.chmod(0o755)
    ours = scheduler(directory, python=str(broken))
    try:
        await ours.ensure(RECORD, Epoch(1), agent_spec())
        assert parent_of(directory) == os.getpid()
        log = directory / RECORD.slug / "agent.log"
        await eventually(lambda: "agent started" in log.read_text())
    finally:
        await ours.close()


async def test_bad_configuration_and_a_signal_are_told_as_they_were(directory: Path) -> None:
    """The exit code of a forked agent arrives through its nursery at once: 64, then -9."""
    ours = scheduler(directory, backoff_max_s=0.2)
    try:
        await ours.ensure(RECORD, Epoch(1), agent_spec(config={"probes": []}))

        async def reason() -> str:
            (one,) = (await ours.snapshot()).placements[RECORD.slug]
            return one.reason

        async def exited() -> bool:
            return "exited with 64" in await reason()

        await eventually(exited)
        other = record_of("crane-8")
        await ours.ensure(other, Epoch(1), agent_spec())
        home = directory / other.slug
        entry = read_entry(home)
        assert entry is not None
        os.kill(entry.pid, signal.SIGKILL)
        await eventually(lambda: (e := read_entry(home)) is not None and e.restarts == 1)
    finally:
        await ours.close()


async def test_s3_forked_agent_whose_pid_was_never_written_is_found(directory: Path) -> None:
    """If the owner died between the fork and writing the file, the agent is found by the lock that
    it holds."""
    ours = scheduler(directory)
    try:
        await ours.ensure(RECORD, Epoch(1), agent_spec())
        home = directory / RECORD.slug
        await eventually((home / "state" / "agent.json").exists)
        before = pids_of(directory)
        entry = read_entry(home)
        assert entry is not None
        assert process.find(home) == (entry.pid, entry.instance)
        await ours.close()
        write_entry(home, replace(entry, state=PlacementState.STARTING, pid=0, pid_start=0))
        ours = scheduler(directory)
        await ours.prepare([agent_spec()])

        async def running() -> bool:
            return await state_of(ours) is PlacementState.RUNNING

        await eventually(running)
        assert pids_of(directory) == before
    finally:
        await ours.close()


async def test_s3_a_held_lock_starts_no_second_agent(directory: Path) -> None:
    """While a process of the device lives, a fork is refused like a spawn."""
    ours = scheduler(directory)
    parents = Parents(python=sys.executable, directory=directory, fork=True)
    try:
        await ours.ensure(RECORD, Epoch(1), agent_spec())
        home, argv = directory / RECORD.slug, [sys.executable, "-m", "watchdog_agent"]
        with pytest.raises(BlockingIOError):
            await asyncio.to_thread(parents.spawn, home, argv, {}, ours=True)
        assert len(pids_of(directory)) == 1
    finally:
        await asyncio.to_thread(parents.close)
        await ours.close()


async def test_forked_agents_have_little_memory_of_their_own(directory: Path) -> None:
    """Each of 8 forked agents uses less than 4 MB that it shares with no other process."""
    ours = scheduler(directory)
    try:
        for number in range(8):
            await ours.ensure(record_of(f"crane-{number}"), Epoch(1), agent_spec())
        logs = list(directory.glob("*/agent.log"))
        await eventually(lambda: all("agent started" in log.read_text() for log in logs))
        assert statistics.median(private_kb(pid) for pid in pids_of(directory)) < 4_000
    finally:
        await ours.close()


def private_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
