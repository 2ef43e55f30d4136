"""End to end: a real queue, the program with its built-in scaler, real workers, on each scheduler."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from servers.nats import NatsServer
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.pools.work import (
    DEPTH,
    LEAST,
    MESSAGES,
    MOST,
    all_done_once,
    config,
    counts,
    process,
    publish,
)


def metric(queue: NatsServer, more: str = "") -> str:
    """The number of waiting messages, from NATS's own page: ten per worker. `more`: another line."""
    return f"""metric "queue" {{
      url    = "{queue.monitor}/jsz?streams=true"
      value  = "{DEPTH}"
      target = 10
      {more}
    }}"""


async def check(plane: ControlPlane, queue: NatsServer, folder: Path) -> None:
    """The pool follows the queue up and down within its bounds, and no message is lost."""
    seen: set[int] = set()

    def keep(answer: Any) -> dict[str, Any]:
        (row,) = answer["items"]
        assert LEAST <= row["count"] <= MOST, row
        seen.add(row["count"])
        return row

    # at first the API lists a pool that has not been created yet
    await plane.until("/v1/pools", lambda a: a["items"][0]["count"] > 0, 60.0)
    await plane.until("/v1/pools", lambda a: counts(keep(a)) == (LEAST, LEAST), 60.0)
    await publish(queue, range(MESSAGES))
    await plane.until("/v1/pools", lambda a: counts(keep(a)) == (MOST, MOST), 60.0)
    await plane.until("/v1/pools", lambda a: keep(a)["value"] == 0 and True, 90.0)
    await plane.until("/v1/pools", lambda a: counts(keep(a)) == (LEAST, LEAST), 60.0)

    all_done_once(folder)
    assert seen >= {1, 3, 5}  # two at a time, as set by step_up
    await by_hand(plane)


async def by_hand(plane: ControlPlane) -> None:
    """The events, the metrics and the command line agree, and an operator can scale the pool."""
    events = await plane.call("GET", "/v1/events?kind=pool.scaled")
    texts = [event["text"] for event in events["items"]]
    assert any("scaled from 1 to 3 workers: metric" in text for text in texts), texts
    listed = await cli(plane, "pools", "ls", "-o", "json")
    assert [row["name"] for row in json.loads(listed)["items"]] == ["encoder"]
    assert "encoder" in await cli(plane, "pools", "ls")
    # 75, try again: Nomad scales no job while its deployment is in progress
    while (await run(plane, "pools", "scale", "encoder", "2")).returncode == 75:
        await asyncio.sleep(0.5)
    await plane.until("/v1/pools", lambda answer: counts(answer["items"][0]) == (2, 2), 60.0)
    refused = await cli(plane, "pools", "scale", "encoder", "6", code=64)
    assert "1 to 5" in refused
    assert "remove its block first" in await cli(plane, "pools", "rm", "encoder", code=64)


async def cli(plane: ControlPlane, *words: str, code: int = 0) -> str:
    done = await run(plane, *words)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


async def run(plane: ControlPlane, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "nomad_watchdog", "--address", plane.api, *words]
    return await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.servers
@pytest.mark.slow_because(
    "workers go through 120 messages, and the pool shrinks after its cool-downs"
)
async def test_local_workers_follow_a_real_queue(queue: NatsServer, tmp_path: Path) -> None:
    """120 messages scale the pool from 1 to 5 processes; each is done once, and the pool shrinks to 1 again."""
    folder = tmp_path / "done"
    text = config("local", process(queue, folder), metric(queue))
    async with ControlPlane(tmp_path, "a", text) as plane:
        await check(plane, queue, folder)
    text = text.replace(text[text.index("agent_pool") :], "")
    # without its block the pool waits until an operator removes it, which stops it
    async with ControlPlane(tmp_path, "a", text) as plane:
        (row,) = (await plane.call("GET", "/v1/pools"))["items"]
        assert (row["configured"], row["running"] > 0) == (False, True)
        await cli(plane, "pools", "rm", "encoder")
        await plane.until("/v1/pools", lambda answer: answer["items"] == [])
        gone = tmp_path / "a" / "data" / "pools" / "encoder" / "pool.json"
        async with asyncio.timeout(20):
            while gone.exists():
                await asyncio.sleep(0.1)


@pytest.mark.slow_because(
    "workers go through 120 messages, and the pool shrinks after its cool-downs"
)
async def test_nomad_workers_follow_a_real_queue(
    queue: NatsServer, nomad: NomadServer, tmp_path: Path
) -> None:
    """The same on a real Nomad, where the job's count is scaled."""
    folder = tmp_path / "done"
    block = f'nomad {{\n  address = "{nomad.http_addr}"\n  job_prefix = "queue"\n}}\n'
    text = config("nomad", process(queue, folder), metric(queue), block)
    async with ControlPlane(tmp_path, "a", text) as plane:
        await check(plane, queue, folder)
        job = await nomad.request("GET", "/v1/job/queue.pool.encoder/scale")
        assert len(job["TaskGroups"]["workers"]["Events"]) >= 4
    await nomad.request("DELETE", "/v1/job/queue.pool.encoder")
