"""Workers as processes: the requested number, one per slot, stopped gracefully, adopted, restarted, replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.errors import NotFoundError, TerminalError
from nomad_watchdog.pools.local import LocalPools

NAP = (sys.executable, "-c", "import time; time.sleep(600)")
DEAF_TEXT = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"])
print("up", flush=True)
time.sleep(600)
"""
DEAF = (sys.executable, "-c", DEAF_TEXT)


def pool(command: tuple[str, ...] = NAP, **more: object) -> PoolSettings:
    return PoolSettings.model_validate(
        {"command": command, "max": 4, "scaler": "none", "kill_timeout": 5.0} | more
    )


@pytest.fixture
async def pools(tmp_path: Path) -> AsyncIterator[LocalPools]:
    """A driver with running workers; all of them are removed at the end."""
    driver = LocalPools(tmp_path / "pools", poll_s=0.05)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(driver.run(lambda: True))
        yield driver
        for name in await driver.list_pools():
            await driver.remove(name)
        await until(lambda: not list((tmp_path / "pools").glob("*/pool.json")))
        task.cancel()


async def until(test: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not test():
            await asyncio.sleep(0.02)


async def running(driver: LocalPools, name: str, count: int) -> None:
    async with asyncio.timeout(60.0):
        while (found := (await driver.list_pools()).get(name)) is None or found.running != count:
            await asyncio.sleep(0.02)


def pids(home: Path) -> dict[str, int]:
    """Slot → the process that holds its lock."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lock = (entry / "fd" / "3").readlink()
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            leads = stat[stat.rindex(")") + 2 :].split()[3] == entry.name
            if lock.name == "lock" and lock.parent.parent == home and leads:
                found[lock.parent.name] = int(entry.name)
    return found


async def test_a_pool_has_as_many_processes_as_it_is_told(
    pools: LocalPools, tmp_path: Path
) -> None:
    """Up from the minimum and down again; a worker that stays is not touched."""
    await pools.ensure("p", pool(min=1))
    await running(pools, "p", 1)
    first = pids(tmp_path / "pools" / "p")
    await pools.scale("p", 3, "")
    await running(pools, "p", 3)
    await pools.ensure("p", pool(min=1))
    assert len(pids(tmp_path / "pools" / "p")) == 3
    await pools.scale("p", 1, "")
    await running(pools, "p", 1)
    await until(lambda: pids(tmp_path / "pools" / "p") == first)


async def test_a_worker_knows_its_pool_and_slot(pools: LocalPools, tmp_path: Path) -> None:
    """Both are in its environment, with the pool's variables and without any secret of this program."""
    os.environ["WATCHDOG_TEST_SECRET"] = "s3cret"
    try:
        await pools.ensure(
            "p", pool(("/bin/sh", "-c", "env; exec sleep 600"), env={"MODE": "fast"})
        )
        log = tmp_path / "pools" / "p" / "0" / "agent.log"
        await until(lambda: log.is_file() and "WORKER_SLOT=0" in log.read_text())
    finally:
        del os.environ["WATCHDOG_TEST_SECRET"]

    assert "WORKER_POOL=p\n" in log.read_text()
    assert "MODE=fast\n" in log.read_text()
    assert "s3cret" not in log.read_text()


async def test_a_worker_that_ends_is_started_again(pools: LocalPools, tmp_path: Path) -> None:
    """After a kill another process is started, about a second later."""
    await pools.ensure("p", pool())
    await running(pools, "p", 1)
    (before,) = pids(tmp_path / "pools" / "p").values()
    os.kill(before, signal.SIGKILL)
    await until(lambda: set(pids(tmp_path / "pools" / "p").values()).isdisjoint({before}))
    await running(pools, "p", 1)

    assert before not in pids(tmp_path / "pools" / "p").values()


async def test_a_worker_that_can_not_start_says_why_and_is_tried_less_and_less(
    pools: LocalPools,
) -> None:
    """A missing program is displayed as the problem, and is not retried in a busy loop."""
    await pools.ensure("p", pool(("/no/such/program",)))
    async with asyncio.timeout(10):
        while "No such file" not in (found := (await pools.list_pools())["p"]).problem:
            await asyncio.sleep(0.05)

    assert (found.count, found.running) == (1, 0)


async def test_a_deaf_worker_is_killed_with_all_that_it_started(
    pools: LocalPools, tmp_path: Path
) -> None:
    """It ignores SIGTERM; after kill_timeout neither it nor its child lives."""
    await pools.ensure("p", pool(DEAF, min=0, kill_timeout=0.3))
    await pools.scale("p", 1, "")
    log = tmp_path / "pools" / "p" / "0" / "agent.log"
    await until(lambda: log.is_file() and "up" in log.read_text())
    await pools.scale("p", 0, "")
    await until(lambda: not (tmp_path / "pools" / "p" / "0").exists())

    assert not _anyone_holds(tmp_path)


def _anyone_holds(folder: Path) -> bool:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if folder in (entry / "fd" / "3").readlink().parents:
                    return True
            except OSError:
                continue
    return False


async def test_workers_outlive_the_driver_and_are_adopted(tmp_path: Path) -> None:
    """The next driver finds the same processes, even if the state of the previous one is lost."""
    first = LocalPools(tmp_path / "pools")
    await first.ensure("p", pool(min=2))
    first.tick()
    before = pids(tmp_path / "pools" / "p")
    assert len(before) == 2
    (tmp_path / "pools" / "p" / "0" / "worker.json").unlink()
    second = LocalPools(tmp_path / "pools")
    second.tick()
    try:
        assert (await second.list_pools())["p"].running == 2
        assert pids(tmp_path / "pools" / "p") == before
    finally:
        await second.remove("p")
        async with asyncio.timeout(15):
            while (tmp_path / "pools" / "p" / "pool.json").exists():
                second.tick()
                await asyncio.sleep(0.02)


async def test_two_drivers_on_one_folder_start_each_worker_once(tmp_path: Path) -> None:
    """A slot's lock admits one process, even in a race."""
    drivers = [LocalPools(tmp_path / "pools") for _ in range(4)]
    await asyncio.gather(*(one.ensure("p", pool(min=3)) for one in drivers))
    await asyncio.gather(*(asyncio.to_thread(one.tick) for one in drivers for _ in range(3)))
    try:
        assert len(pids(tmp_path / "pools" / "p")) == 3
    finally:
        await drivers[0].remove("p")
        async with asyncio.timeout(15):
            while (tmp_path / "pools" / "p" / "pool.json").exists():
                drivers[0].tick()
                await asyncio.sleep(0.02)


async def test_a_changed_worker_is_replaced_one_at_a_time(
    pools: LocalPools, tmp_path: Path
) -> None:
    """A new environment means new processes, and at most one worker is missing at any time."""
    await pools.ensure("p", pool(min=3))
    await running(pools, "p", 3)
    home = tmp_path / "pools" / "p"
    before = pids(home)
    await pools.ensure("p", pool(min=3, env={"A": "2"}))
    least = 3
    async with asyncio.timeout(20):
        while len(found := pids(home)) < 3 or set(found.values()) & set(before.values()):
            least = min(least, len(found))
            await asyncio.sleep(0.01)

    assert least >= 2


async def test_bounds_that_moved_move_the_count(pools: LocalPools) -> None:
    """A pool of 3 whose maximum became 2 has 2."""
    await pools.ensure("p", pool(min=3))
    await pools.ensure("p", pool(min=1, max=2))
    await running(pools, "p", 2)


async def test_a_removed_pool_is_gone_and_can_come_again(pools: LocalPools, tmp_path: Path) -> None:
    """No process, no entry; then a new pool with that name starts with its minimum."""
    await pools.ensure("p", pool(min=2))
    await running(pools, "p", 2)
    await pools.remove("p")
    await pools.remove("p")
    await until(lambda: not (tmp_path / "pools" / "p" / "pool.json").exists())
    with pytest.raises(NotFoundError):
        await pools.scale("p", 1, "")
    await pools.ensure("p", pool(min=1))
    await running(pools, "p", 1)


async def test_cpu_and_memory_are_measured_over_the_session(
    pools: LocalPools,
) -> None:
    """A worker whose child uses all the CPU that it gets uses far more than a sleeping one, and no more than a core;
    both use some memory."""
    burn = pool(("/bin/sh", "-c", f"{sys.executable} -c 'while True: pass' & wait"), memory="64Mi")
    nap = pool(("sleep", "600"), memory="64Mi")
    await pools.ensure("burn", burn)
    await pools.ensure("nap", nap)
    await running(pools, "burn", 1)
    await running(pools, "nap", 1)
    await asyncio.sleep(1.0)  # an interpreter uses CPU while it starts
    assert await pools.usage("burn", burn) is None  # one reading is not a rate
    assert await pools.usage("nap", nap) is None
    await asyncio.sleep(1.5)
    hot, cold = await pools.usage("burn", burn), await pools.usage("nap", nap)

    assert hot is not None
    assert cold is not None
    assert 10 * cold.cpu + 1 < hot.cpu < 130
    assert 0 < cold.memory < hot.memory < 100


async def test_a_damaged_file_is_the_trouble_of_one_pool(pools: LocalPools, tmp_path: Path) -> None:
    """A pool.json that is not JSON is reported with its path; another pool is started, scaled and listed, and the
    damaged file is not overwritten."""
    await pools.ensure("good", pool(min=1))
    (tmp_path / "pools" / "bad").mkdir()
    (tmp_path / "pools" / "bad" / "pool.json").write_text("{")
    await pools.scale("good", 2, "")
    await running(pools, "good", 2)
    assert "pool.json is damaged" in (await pools.list_pools())["bad"].problem
    with pytest.raises(TerminalError, match=r"pool\.json is damaged"):
        await pools.ensure("bad", pool())
    (tmp_path / "pools" / "bad" / "pool.json").unlink()


async def test_pools_that_come_and_go_are_looked_at_without_an_error(
    pools: LocalPools,
) -> None:
    """A pool that is removed while it is read raises nothing, which would end the control plane."""
    for _ in range(5):
        await pools.ensure("p", pool(min=2))
        await running(pools, "p", 2)
        await pools.remove("p")
        for _ in range(50):
            await pools.list_pools()
            await pools.usage("p", pool())
