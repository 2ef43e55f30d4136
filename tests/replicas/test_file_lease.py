"""The lease of a local registry: a lock file."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import suppress
from pathlib import Path

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.ids import Shard
from nomad_watchdog.replicas.file_lease import FileLeases

HOLDER = """
import asyncio, sys
from pathlib import Path
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.replicas.file_lease import FileLeases
async def main():
    leases = FileLeases(Path(sys.argv[1]), shards=2, replica="other", api="http://127.0.0.1:9", clock=SystemClock())
    running = asyncio.ensure_future(leases.run())
    await leases.changed.wait()
    print("held", flush=True)
    await running
asyncio.run(main())
"""


def leases(path: Path) -> FileLeases:
    return FileLeases(path, shards=2, replica="me", api="http://127.0.0.1:1", clock=SystemClock())


async def test_a_killed_holder_is_followed_by_who_waits(tmp_path: Path) -> None:
    """One process holds all shards; when it is killed the next one holds them, with a higher term."""
    path = tmp_path / "registry.db.lease"
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(path), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        async with asyncio.timeout(20):
            assert await holder.stdout.readline() == b"held\n"
        mine = leases(path)
        task = asyncio.ensure_future(mine.run())
        async with asyncio.timeout(10):
            while not mine.problem:
                await asyncio.sleep(0.01)
        assert "other" in mine.problem
        assert mine.terms() == {}
        assert [one.holder for one in mine.all()] == ["other", "other"]
        assert mine.configs() == [""], (
            "the holder is there, and did not say what it is configured with"
        )
        holder.send_signal(signal.SIGKILL)
        async with asyncio.timeout(10):
            await mine.changed.wait()
        assert set(mine.terms()) == {Shard(0), Shard(1)}
        assert mine.terms()[Shard(0)].number == 2
        assert [one.holder for one in mine.all()] == ["me", "me"]
        assert mine.configs() == []
        await mine.announce("c1")
        assert leases(path).configs() == ["c1"]
        await mine.release()
        assert mine.terms() == {}
        assert [one.holder for one in mine.all()] == ["", ""]
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    finally:
        with suppress(ProcessLookupError):
            holder.kill()
        await holder.wait()


async def test_a_file_that_makes_no_sense_is_no_obstacle(tmp_path: Path) -> None:
    """The file's content is only information: the lock alone decides."""
    path = tmp_path / "registry.db.lease"
    path.write_text("{half")
    mine = leases(path)
    task = asyncio.ensure_future(mine.run())
    async with asyncio.timeout(10):
        await mine.changed.wait()
    assert mine.terms()[Shard(1)].number == 1
    assert json.loads(path.read_text())["replica"] == "me"
    await mine.release()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
