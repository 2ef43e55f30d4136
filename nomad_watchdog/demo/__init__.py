"""`nomad-watchdog demo`: a fleet comes up, things happen to it, and each is seen to be handled."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nomad_watchdog.demo.fleet import SimulatedFleet
from nomad_watchdog.demo.show import Show
from nomad_watchdog.demo.stage import BRISK, CALM, Stage, open_stage
from nomad_watchdog.dev.process import free_port
from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import DeviceId, slug_of

STEP_TIMEOUT_S: Final = 90.0
POLL_S: Final = 0.1
FEW: Final = 50
"""Up to so many devices are probed twice a second; more would load a small machine for nothing."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """How one step ended."""

    name: str
    converged: bool
    took_s: float
    detail: str


@dataclass(slots=True)
class Demo:
    """The steps, in order, over one stage and one simulated fleet."""

    stage: Stage
    fleet: SimulatedFleet
    show: Show
    count: int
    results: list[StepResult] = field(default_factory=list)

    async def run(self) -> None:
        """All steps; a step that does not converge is reported, and the next one is tried."""
        steps: list[tuple[str, Callable[[], Awaitable[str]]]] = [
            (f"{self.count} devices appear", self.come_up),
            ("an agent is killed with kill -9", self.kill_agent),
            ("a device goes offline and leaves", self.device_leaves),
            ("a device vanishes without a word", self.device_vanishes),
            ("a device reboots", self.device_reboots),
            ("a new device appears", self.device_appears),
            ("the reconciler is killed and started again", self.kill_reconciler),
        ]
        for name, step in steps:
            began = time.monotonic()
            self.show.step(name)
            try:
                async with asyncio.timeout(STEP_TIMEOUT_S):
                    detail = await step()
                converged = True
            except (TimeoutError, TransientError) as error:
                detail, converged = str(error) or f"not within {STEP_TIMEOUT_S:.0f} s", False
            result = StepResult(name, converged, round(time.monotonic() - began, 1), detail)
            self.results.append(result)
            self.show.done(result.name, result.detail, result.took_s, converged=converged)

    async def item(self, name: str) -> dict[str, Any]:
        """One device as the API shows it."""
        items = await self.look()
        return next((i for i in items if i["id"] == name), {})

    async def look(self) -> list[dict[str, Any]]:
        """All devices; the table is drawn anew."""
        try:
            items = await self.stage.items()
        except TransientError:
            return []
        self.show.table(items)
        return items

    async def until(self, name: str, *verdicts: str) -> dict[str, Any]:
        """Wait until a device has one of these verdicts."""
        while True:
            item = await self.item(name)
            if item and item["verdict"] in verdicts:
                return item
            await asyncio.sleep(POLL_S)

    async def come_up(self) -> str:
        names = [f"device-{n:02}" for n in range(1, self.count + 1)]
        devices = {name: (await self.fleet.add(name)).address for name in names}
        await self.stage.register(devices)
        with self.show.progress(len(names)) as advance:
            while True:
                items = await self.look()
                ready = sum(i["verdict"] == "watched" for i in items)
                advance(ready)
                if ready == len(names):
                    break
                await asyncio.sleep(POLL_S)
        if not self.stage.consul:
            return f"{len(names)} agents ready, one for each"
        # Consul asks each agent every 10 s, beginning at a random moment.
        while await self.stage.passing() < len(names):
            await self.look()
            await asyncio.sleep(0.5)
        return f"{len(names)} agents ready, one for each, all passing in Consul"

    async def kill_agent(self) -> str:
        name = "device-03"
        slug = slug_of(DeviceId(name))
        before = await self.item(name)
        pid = self.stage.agent_pid(slug)
        os.kill(pid, signal.SIGKILL)
        while True:
            again = self.stage.agent_pids().get(slug)
            item = await self.item(name)
            if again not in {None, pid} and item.get("verdict") == "watched":
                break
            await asyncio.sleep(POLL_S)
        if item["epoch"] != before["epoch"]:
            raise TransientError("a restart in place changed the epoch")
        return f"pid {pid} → {again}, restarted by the scheduler in the same placement"

    async def device_leaves(self) -> str:
        name = "device-05"
        slug = slug_of(DeviceId(name))
        pid = self.stage.agent_pid(slug)
        with self.stage.farewell(slug) as said_goodbye:
            await self.fleet.devices[name].power_off()
            await self.stage.deregister(name)
            while True:
                item = await self.item(name)
                gone = slug not in self.stage.agent_pids()
                if item.get("verdict") == "departed" and gone and await said_goodbye():
                    break
                await asyncio.sleep(POLL_S)
        evidence = "left Consul by itself" if self.stage.consul else "logged its shutdown"
        return f"agent {pid} was shut down gracefully: it {evidence}"

    async def device_vanishes(self) -> str:
        name = "device-07"
        await self.fleet.devices[name].power_off()
        item = await self.until(name, "offline")
        return f"offline, confirmed by a second probe: {item['reason']}"

    async def device_reboots(self) -> str:
        name = "device-09"
        before = await self.item(name)
        await self.fleet.devices[name].power_off()
        await self.until(name, "suspect", "offline")
        await self.fleet.devices[name].power_on()
        item = await self.until(name, "watched")
        if item["epoch"] != before["epoch"]:
            raise TransientError("the agent was replaced for a reboot of its device")
        return "noticed, and watched again by the same agent"

    async def device_appears(self) -> str:
        name = f"device-{self.count + 1:02}"
        device = await self.fleet.add(name)
        began = time.monotonic()
        await self.stage.register({name: device.address})
        await self.until(name, "watched")
        return f"watched {time.monotonic() - began:.1f} s after it was registered"

    async def kill_reconciler(self) -> str:
        before = self.stage.agent_pids()
        verdicts = {i["id"]: i["verdict"] for i in await self.look()}
        if not verdicts or self.stage.reconciler is None:
            raise TransientError("there is no running reconciler to kill")
        await self.stage.reconciler.kill()
        await self.stage.start_reconciler()
        while True:
            same = {i["id"]: i["verdict"] for i in await self.look()} == verdicts
            # Level-triggered means that a second look changes nothing either.
            if same and await self.stage.metric('passes_total{outcome="ok"}') >= 2:
                break
            await asyncio.sleep(POLL_S)
        done = await self.stage.metric("dispatches_total") + await self.stage.metric(
            "retires_total"
        )
        after = self.stage.agent_pids()
        if done or after != before:
            differ = len(before.items() ^ after.items())
            raise TransientError(f"{done:.0f} actions; {differ} processes differ")
        return f"every verdict as before, 0 actions, all {len(after)} agents kept their process"


async def _run(backend: str, devices: int, output: str, strategy: str) -> int:
    show = Show(live=output == "table" and sys.stderr.isatty())
    main_task = asyncio.current_task()
    assert main_task is not None
    interrupted = tidying = False

    def interrupt() -> None:
        # Only the first signal cancels, and none does later: that would cut short the tidying up.
        nonlocal interrupted
        if not interrupted and not tidying:
            show.say("interrupted; stopping everything that was started")
            main_task.cancel()
        interrupted = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    began = time.monotonic()
    port = free_port()
    with tempfile.TemporaryDirectory(
        prefix="nomad-watchdog-demo-", ignore_cleanup_errors=True
    ) as at:
        fleet = SimulatedFleet(port=port)
        try:
            show.say(f"starting the {backend} backend below {at}")
            pace = BRISK if devices <= FEW else CALM
            async with open_stage(backend, Path(at), port, strategy=strategy, pace=pace) as stage:
                demo = Demo(stage, fleet, show, devices)
                try:
                    with show:
                        await demo.run()
                finally:
                    tidying = True
                show.say("stopping everything that was started")
        except asyncio.CancelledError:
            if not interrupted:
                raise
        finally:
            await fleet.close()
    if interrupted:
        # A second Ctrl-C while the interpreter goes down would end it by signal, not with 130.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        show.say("stopped")
        return 130
    summary = {
        "backend": backend,
        "devices": devices,
        "converged": bool(demo.results) and all(r.converged for r in demo.results),
        "took_s": round(time.monotonic() - began, 1),
        "steps": [
            {"name": r.name, "converged": r.converged, "took_s": r.took_s, "detail": r.detail}
            for r in demo.results
        ],
    }
    if output == "json":
        print(json.dumps(summary, indent=2))
    else:
        show.summary(summary)
    return 0 if summary["converged"] else 1


def main(
    backend: str = "nomad", devices: int = 20, output: str = "table", strategy: str = "dispatch"
) -> int:
    """Run the demo; 0 only if every step converged, 130 after Ctrl-C.

    `devices`: 10 to 200. Raises nothing of its own; what it started is stopped in every case.
    """
    return asyncio.run(_run(backend, devices, output, strategy))
