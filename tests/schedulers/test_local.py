"""Behaviour specific to the local scheduler: processes, files and several schedulers at once."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nomad_watchdog.errors import TransientError, UserError
from nomad_watchdog.model import Epoch, PlacementState
from nomad_watchdog.schedulers.local import LocalScheduler, process
from nomad_watchdog.schedulers.local.files import LOG_BYTES, read_entry, write_entry
from nomad_watchdog.testing.conformance import record_of
from tests.schedulers.conftest import adopted_tended_and_retired, eventually, local_spec, pids_of

RECORD = record_of("crane-7")
OWNER = """
import asyncio, json, sys
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers.local import LocalScheduler
from nomad_watchdog.testing.conformance import record_of
async def main():
    command = {"command": json.dumps(["sleep", "600"])}
    spec = AgentSpec(agent_class="default", version="1", spec_hash="h1", variables=command)
    scheduler = LocalScheduler(directory=sys.argv[1], poll_s=0.1)
    await scheduler.prepare([spec])
    for number in range(5):
        await scheduler.ensure(record_of(f"crane-{number}"), Epoch(1), spec)
    print("placed", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def scheduler(directory: Path) -> LocalScheduler:
    return LocalScheduler(directory=directory, backoff_initial_s=0.1, poll_s=0.1)


async def owner(directory: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(directory), stdout=asyncio.subprocess.PIPE
    )


async def placed(started: asyncio.subprocess.Process) -> None:
    assert started.stdout is not None
    async with asyncio.timeout(20):
        assert await started.stdout.readline() == b"placed\n"


async def killed(started: asyncio.subprocess.Process) -> None:
    started.kill()
    await started.communicate()


def restarts_in(directory: Path) -> list[int]:
    entries = [read_entry(home) for home in directory.iterdir()]
    return sorted(one.restarts for one in entries if one)


async def test_l3_killed_owner_leaves_agents_and_the_next_adopts_them(directory: Path) -> None:
    """kill -9 of the process that started agents neither stops nor restarts any of them."""
    first = await owner(directory)
    await placed(first)
    before = pids_of(directory)
    await killed(first)
    assert len(before) == 5
    await adopted_tended_and_retired(scheduler(directory), directory, before)


async def test_s3_two_processes_racing_end_with_one_agent_a_device(directory: Path) -> None:
    """Two processes that place the same devices at once start one agent per device."""
    both = await asyncio.gather(owner(directory), owner(directory))
    try:
        await asyncio.gather(*(placed(one) for one in both))
        before = pids_of(directory)
        assert len(before) == 5
        os.kill(min(before), signal.SIGKILL)
        await eventually(lambda: len(pids_of(directory)) == 5 and pids_of(directory) != before)
        # The process exists before its file is complete; killing the owner in between leaves this
        # state.
        await eventually(lambda: restarts_in(directory) == [0, 0, 0, 0, 1])
    finally:
        await asyncio.gather(*(killed(one) for one in both))
    assert restarts_in(directory) == [0, 0, 0, 0, 1]


async def test_l2_restart_whose_owner_died_before_writing_it_down_is_counted(
    directory: Path,
) -> None:
    """If the owner dies right after restarting a process, the process is adopted and its restart is
    counted."""
    ours = scheduler(directory)
    try:
        await ours.ensure(RECORD, Epoch(1), local_spec())
        home = directory / RECORD.slug
        entry = read_entry(home)
        assert entry is not None
        await ours.close()
        forgotten = replace(entry, state=PlacementState.RESTARTING, pid=0, pid_start=0)
        write_entry(home, forgotten)
        ours = scheduler(directory)
        await ours.prepare([local_spec()])
        await eventually(lambda: restarts_in(directory) == [1])
        (one,) = (await ours.snapshot()).placements[RECORD.slug]
        assert (one.state, one.restarts) == (PlacementState.RUNNING, 1)
        assert pids_of(directory) == {entry.pid}
        await ours.retire(one, 5.0)
        await eventually(lambda: not pids_of(directory))
    finally:
        await ours.close()


async def test_s3_reused_pid_is_never_signalled(directory: Path) -> None:
    """A recorded pid that now belongs to another process is neither signalled nor counted as
    alive."""
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    await asyncio.sleep(2 / os.sysconf("SC_CLK_TCK"))  # a pid can't be used again in the same tick
    ours = scheduler(directory)
    try:
        await ours.ensure(RECORD, Epoch(1), local_spec())
        home = directory / RECORD.slug
        (agent,) = pids_of(directory)
        await ours.close()
        os.kill(agent, signal.SIGKILL)
        os.waitpid(agent, 0)
        entry = read_entry(home)
        assert entry is not None
        write_entry(home, replace(entry, pid=stranger.pid))
        ours = scheduler(directory)
        (one,) = (await ours.snapshot()).placements[RECORD.slug]
        await ours.retire(one, 0.1)

        async def dead() -> bool:
            found = (await ours.snapshot()).placements[RECORD.slug]
            return found[0].state is PlacementState.DEAD

        await eventually(dead)
        assert process.start_time(stranger.pid)
    finally:
        await ours.close()
        stranger.kill()
        await stranger.wait()


async def test_s9_corrupt_placement_costs_only_itself(directory: Path) -> None:
    """A damaged placement.json is rewritten around the running agent; other agents are
    untouched."""
    ours = scheduler(directory)
    try:
        other = record_of("crane-8")
        await ours.ensure(RECORD, Epoch(4), local_spec())
        await ours.ensure(other, Epoch(1), local_spec())
        before = pids_of(directory)
        (directory / RECORD.slug / "placement.json").write_text("{]")
        seen = (await ours.snapshot()).placements
        assert seen[RECORD.slug][0].epoch == 4
        assert seen[RECORD.slug][0].state is PlacementState.RUNNING
        assert seen[other.slug][0].state is PlacementState.RUNNING
        assert pids_of(directory) == before
    finally:
        await ours.close()


async def test_retire_kills_what_ignores_sigterm(directory: Path) -> None:
    """An agent that ignores SIGTERM is killed soon after its grace period."""
    code = (
        "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    )
    ours = scheduler(directory)
    try:
        await ours.ensure(RECORD, Epoch(1), local_spec(sys.executable, "-c", code))
        log = directory / RECORD.slug / "agent.log"
        await eventually(lambda: log.read_text() == "up\n")
        (one,) = (await ours.snapshot()).placements[RECORD.slug]
        await ours.retire(one, 0.3)
        assert pids_of(directory), "it was killed before its grace"
        await eventually(lambda: not pids_of(directory))
    finally:
        await ours.close()


async def test_exit_0_is_dead_for_good(directory: Path) -> None:
    """An agent that exits 0 has retired: it is DEAD and not started again."""
    ours = scheduler(directory)
    try:
        await ours.ensure(RECORD, Epoch(1), local_spec("true"))

        async def dead() -> bool:
            (one,) = (await ours.snapshot()).placements[RECORD.slug]
            return one.state is PlacementState.DEAD and one.restarts == 0

        await eventually(dead)
        (one,) = (await ours.snapshot()).placements[RECORD.slug]
        assert await ours.sweep([one]) == 1
        assert not (directory / RECORD.slug).exists()
    finally:
        await ours.close()


async def test_s9_log_is_bounded(directory: Path) -> None:
    """A log past 1 MiB is copied to a single old log, which only its owner can read, and truncated."""
    code = "import time\nprint('x' * 1500000, flush=True)\ntime.sleep(600)"
    ours = scheduler(directory)
    try:
        await ours.ensure(RECORD, Epoch(1), local_spec(sys.executable, "-c", code))
        old = directory / RECORD.slug / "agent.log.1"
        log = directory / RECORD.slug / "agent.log"
        await eventually(lambda: old.exists() and log.stat().st_size == 0)
        assert old.stat().st_size == LOG_BYTES
        assert stat.S_IMODE(old.stat().st_mode) == 0o600
    finally:
        await ours.close()


async def test_earlier_epoch_still_running_is_transient(directory: Path) -> None:
    """The next epoch is not placed beside a live one (S3)."""
    ours = scheduler(directory)
    try:
        await ours.ensure(RECORD, Epoch(1), local_spec())
        with pytest.raises(TransientError, match="retire it first"):
            await ours.ensure(RECORD, Epoch(2), local_spec())
        assert len(pids_of(directory)) == 1
    finally:
        await ours.close()


async def test_unusable_directory_is_a_user_error(tmp_path: Path) -> None:
    """A file in place of the directory is a readable error for the operator to fix."""
    (tmp_path / "file").write_text("")
    ours = LocalScheduler(directory=tmp_path / "file" / "agents")
    with pytest.raises(UserError, match="writable directory"):
        await ours.prepare([local_spec()])
    await ours.close()


async def test_full_disk_is_transient(directory: Path) -> None:
    """If a file cannot be written completely, ensure raises a transient error and starts
    nothing."""
    import resource

    ours = scheduler(directory)
    await ours.prepare([local_spec()])
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(TransientError, match="cannot place"):
            await ours.ensure(RECORD, Epoch(1), local_spec())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
        await ours.close()
    assert not pids_of(directory)
