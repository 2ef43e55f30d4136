"""The orchestrator that this project replaces, compared with this project ("ours"), on the same Nomad.

The naive one, as it is usually written, in one thread, with python-nomad:

- every second it reads the list of devices, and dispatches an agent for each new one, one after another;
- then it queries Nomad for each agent that it started and has not yet seen running, one after another;
- a device that was registered more than ALERT_S ago and whose agent was not seen running is "offline".

All devices register at once, as after a power cut, and all of them are on: every alert is false. The lag of
a device is from its registration to its job's submission, as recorded by Nomad, for both.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import nomad  # type: ignore[import-untyped]  # python-nomad ships no types

from bench.plane import bare_body, bare_client, nomad_server, plane, settings
from bench.rows import Row, percentile
from nomad_watchdog.model import VerdictState
from servers.nomad import NomadServer

ALERT_S = 5.0
LIMIT_S = 120.0


class Naive(threading.Thread):
    """See the module docstring."""

    def __init__(self, address: str, parent: str, devices: list[str]) -> None:
        super().__init__(daemon=True)
        self.library = nomad.Nomad(address=address, timeout=15)
        self.parent = parent
        self.devices = devices
        self.registered_at = time.monotonic()
        self.jobs: dict[str, str] = {}
        self.up: set[str] = set()
        self.alerts: set[str] = set()
        self.halted = threading.Event()

    def run(self) -> None:
        while len(self.up) < len(self.devices) and not self.halted.is_set():
            for name in self.devices:
                if name not in self.jobs:
                    answer: Any = self.library.job.request(
                        self.parent, "dispatch", json=bare_body(name), method="post"
                    )
                    self.jobs[name] = answer.json()["DispatchedJobID"]
            for name, job in self.jobs.items():
                if name not in self.up:
                    allocs = self.library.job.get_allocations(job)
                    if any(one["ClientStatus"] == "running" for one in allocs):
                        self.up.add(name)
                if name not in self.up and time.monotonic() - self.registered_at > ALERT_S:
                    self.alerts.add(name)
            self.halted.wait(1.0)


async def _lags(server: NomadServer, prefix: str, since: float) -> list[float]:
    jobs = await server.request("GET", f"/v1/jobs?prefix={prefix}/dispatch-")
    return [job["SubmitTime"] / 1e9 - since for job in jobs]


async def measure(counts: tuple[int, ...]) -> list[Row]:
    rows = []
    async with nomad_server() as (server, root):
        for count in counts:
            names = [f"device-{n}" for n in range(count)]
            parent, prefix = f"naive-{count}", f"ours-{count}"
            async with bare_client(server, parent):
                began = time.time()
                naive = Naive(server.http_addr, parent, names)
                naive.start()
                await asyncio.to_thread(naive.join, LIMIT_S)
                # Its time is over: a round in progress must not run at the same time as ours.
                naive.halted.set()
                await asyncio.to_thread(naive.join)
            theirs = await _lags(server, parent, began)

            chosen, _ = settings(server, root / prefix, prefix)
            false_alerts = 0
            async with plane(chosen) as ours, ours.running():
                await ours.fleet.readiness.event.wait()
                began = time.time()
                await ours.register(names)
                waiting = asyncio.ensure_future(ours.until_started(count, LIMIT_S))
                while not waiting.done():
                    await asyncio.sleep(0.1)
                    false_alerts = max(
                        false_alerts, ours.fleet.verdicts.counts()[VerdictState.OFFLINE]
                    )
                await waiting
                # As long as the naive one had before it alerted.
                await asyncio.sleep(ALERT_S)
                false_alerts = max(false_alerts, ours.fleet.verdicts.counts()[VerdictState.OFFLINE])
            mine = await _lags(server, prefix, began)
            assert len(mine) == count, (len(mine), count)
            rows += [
                Row(
                    f"lag p99, {count:,} devices at once, naive ÷ ours",
                    percentile(theirs, 0.99) / percentile(mine, 0.99),
                    "×",
                    note=f"naive p50 {percentile(theirs, 0.5):.1f} s, p99 {percentile(theirs, 0.99):.1f} s; "
                    f"ours {percentile(mine, 0.5):.1f} s, {percentile(mine, 0.99):.1f} s",
                ),
                Row(
                    f"false offline alerts, {count:,} devices, ours",
                    false_alerts,
                    "",
                    floor="≤ 0",
                    aim="≤ 0",
                    note=f"naive: {len(naive.alerts)}",
                ),
            ]
    return rows


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure((50,) if quick else (100, 500, 2000)))
