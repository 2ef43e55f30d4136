"""A new control plane over a running fleet: how soon its decision is correct, and that it changes nothing.

Ours is the program as a user starts it (`nomad-watchdog plan`: start the interpreter, read both stores, decide).
The raw side is an interpreter that reads the same two lists from Nomad and decodes them.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from bench.plane import nomad_server, plane, settings
from bench.rows import Row
from nomad_watchdog.demo.process import clean_environment

RAW = """
import json, sys, urllib.request
for path in ("jobs?prefix=ours&meta=true", "allocations?task_states=true"):
    token = ""
    while True:
        url = f"{sys.argv[1]}/v1/{path}&per_page=1000&next_token={token}"
        with urllib.request.urlopen(url) as answer:
            json.loads(answer.read())
            token = answer.headers.get("X-Nomad-NextToken") or ""
        if not token:
            break
"""
RUNS = 3

Versions = Callable[[], Awaitable[dict[str, Any]]]


def _timed(*argv: str) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *argv], env=clean_environment(), check=True, capture_output=True, text=True
    )
    return time.perf_counter() - began, done.stdout


async def _touched(versions: Versions, file: Path, seconds: float) -> int:
    """Number of changed, new and lost objects while `nomad-watchdog run` managed the fleet."""
    before = await versions()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nomad_watchdog", "--config", str(file), "run",
        env=clean_environment() | {"NOMAD_WATCHDOG_API_LISTEN": "127.0.0.1:0"},
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    await asyncio.sleep(seconds)
    assert child.returncode is None
    child.terminate()
    await child.wait()
    return len(before.items() ^ (await versions()).items())


async def rows_of(
    what: str, file: Path, count: int, raw: Sequence[str], versions: Versions
) -> list[Row]:
    """Measure a running fleet. `raw`: arguments of an interpreter that reads the same lists; `versions`: name → version; a
    version changes when its object is written."""
    ratios, mine, planned = [], [], 0
    for _ in range(RUNS):
        raw_s, _ = await asyncio.to_thread(_timed, *raw)
        ours_s, said = await asyncio.to_thread(
            _timed, "-m", "nomad_watchdog", "--config", str(file), "plan", "-o", "json"
        )
        planned = max(planned, len(json.loads(said)["actions"]))
        ratios.append(ours_s / raw_s)
        mine.append(ours_s)
    touched = await _touched(versions, file, 25.0)
    return [
        Row(
            f"{what} over {count:,} agents, first decision ÷ raw list",
            statistics.median(ratios),
            "×",
            note=f"{statistics.median(mine):.2f} s from the program's start",
        ),
        Row(
            f"{what}, spurious actions",
            planned + touched,
            "",
            floor="≤ 0",
            aim="≤ 0",
            note="planned by it, or jobs touched in 25 s of running",
        ),
    ]


async def measure(count: int) -> list[Row]:
    async with nomad_server() as (server, root):
        chosen, file = settings(server, root / "ours", "ours")
        async with plane(chosen) as ours:
            await ours.register([f"device-{n}" for n in range(count)])
            async with ours.running():
                await ours.until_started(count, 400.0)

        async def versions() -> dict[str, Any]:
            jobs: list[Any] = await server.request("GET", "/v1/jobs?prefix=ours")
            return {job["ID"]: job["JobModifyIndex"] for job in jobs}

        return await rows_of("restart", file, count, ["-c", RAW, server.http_addr], versions)


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(500 if quick else 10_000))
