"""The steps of the demo."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.display import Show
from nomad_watchdog.demo.stage import Stage, StageDevice
from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import DeviceId, slug_of

STEP_TIMEOUT_S: Final = 90.0
POLL_S: Final = 0.1


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
        """Run all steps. If one does not converge, the following ones are run as well."""
        steps: list[tuple[str, Callable[[], Awaitable[str]]]] = [
            (f"{self.count} devices appear", self.come_up),
            ("an agent is killed with kill -9", self.kill_agent),
            ("a device is switched off and deregistered", self.device_leaves),
            ("a device stops responding", self.device_stops_responding),
            ("a device reboots", self.device_reboots),
            ("a new device is registered", self.device_appears),
            ("the reconciler is killed and restarted", self.kill_reconciler),
        ]
        for name, step in steps:
            began = time.monotonic()
            self.show.running(name)
            try:
                async with asyncio.timeout(STEP_TIMEOUT_S):
                    detail = await step()
                converged = True
            except (TimeoutError, TransientError) as error:
                converged = False
                detail = str(error) or f"did not converge within {STEP_TIMEOUT_S:.0f} s"
            result = StepResult(name, converged, round(time.monotonic() - began, 1), detail)
            self.results.append(result)
            self.show.done(result.name, result.detail, result.took_s, converged=converged)

    async def item(self, name: str) -> StageDevice | None:
        """Return one device as the API returns it, or None."""
        return next((one for one in await self.poll() if one["id"] == name), None)

    async def existing(self, name: str) -> StageDevice:
        """As `item`; raises TransientError when there is none."""
        item = await self.item(name)
        if item is None:
            raise TransientError(f"the API does not list {name}")
        return item

    async def poll(self) -> list[StageDevice]:
        """Read all devices and update the live view. Returns nothing while the API is unavailable."""
        try:
            items = await self.stage.items()
        except TransientError:
            return []
        self.show.devices(items)
        return items

    async def until(self, name: str, *verdicts: str) -> StageDevice:
        """Wait until a device has one of these verdicts."""
        while True:
            item = await self.item(name)
            if item is not None and item["verdict"] in verdicts:
                return item
            await asyncio.sleep(POLL_S)

    async def come_up(self) -> str:
        names = [f"device-{n:02}" for n in range(1, self.count + 1)]
        devices = {name: (await self.fleet.add(name)).address for name in names}
        await self.stage.register(devices)
        while True:
            items = await self.poll()
            if sum(i["verdict"] == "watched" for i in items) == len(names):
                break
            await asyncio.sleep(POLL_S)
        if not self.stage.consul:
            return "one agent ready per device"
        # Consul checks each agent every 10 s, starting at a random moment.
        while await self.stage.passing() < len(names):
            await self.poll()
            await asyncio.sleep(0.5)
        return "one agent ready per device, passing in Consul"

    async def kill_agent(self) -> str:
        name = "device-03"
        slug = slug_of(DeviceId(name))
        before = await self.existing(name)
        pid = self.stage.agent_pid(slug)
        os.kill(pid, signal.SIGKILL)
        while True:
            again = self.stage.agent_pids().get(slug)
            item = await self.item(name)
            if again not in {None, pid} and item is not None and item["verdict"] == "watched":
                break
            await asyncio.sleep(POLL_S)
        if item["epoch"] != before["epoch"]:
            raise TransientError("the agent was replaced instead of restarted: its epoch changed")
        return f"restarted by the scheduler in the same placement, pid {again} (was {pid})"

    async def device_leaves(self) -> str:
        name = "device-05"
        slug = slug_of(DeviceId(name))
        pid = self.stage.agent_pid(slug)
        with self.stage.shutdown_of(slug) as was_graceful:
            await self.fleet.devices[name].power_off()
            await self.stage.deregister(name)
            while True:
                item = await self.item(name)
                gone = slug not in self.stage.agent_pids()
                departed = item is not None and item["verdict"] == "departed"
                if departed and gone and await was_graceful():
                    break
                await asyncio.sleep(POLL_S)
        evidence = "deregistered from Consul" if self.stage.consul else "logged it"
        return f"its agent (pid {pid}) shut down gracefully and {evidence}"

    async def device_stops_responding(self) -> str:
        name = "device-07"
        await self.fleet.devices[name].power_off()
        item = await self.until(name, "offline")
        return f"offline, two probes agree: {item['reason']}"

    async def device_reboots(self) -> str:
        name = "device-09"
        before = await self.existing(name)
        await self.fleet.devices[name].power_off()
        await self.until(name, "suspect", "offline")
        await self.fleet.devices[name].power_on()
        item = await self.until(name, "watched")
        if item["epoch"] != before["epoch"]:
            raise TransientError("the agent was replaced although only its device rebooted")
        return "detected; the same agent watches it again"

    async def device_appears(self) -> str:
        name = f"device-{self.count + 1:02}"
        device = await self.fleet.add(name)
        began = time.monotonic()
        await self.stage.register({name: device.address})
        await self.until(name, "watched")
        return f"watched after {time.monotonic() - began:.1f} s"

    async def kill_reconciler(self) -> str:
        before = self.stage.agent_pids()
        verdicts = {i["id"]: i["verdict"] for i in await self.poll()}
        if not verdicts or self.stage.reconciler is None:
            raise TransientError("there is no running reconciler to kill")
        await self.stage.reconciler.kill()
        await self.stage.start_reconciler()
        while True:
            same = {i["id"]: i["verdict"] for i in await self.poll()} == verdicts
            # A level-triggered reconciler changes nothing in its second pass either.
            if same and await self.stage.metric('passes_total{outcome="ok"}') >= 2:
                break
            await asyncio.sleep(POLL_S)
        done = await self.stage.metric("dispatches_total") + await self.stage.metric(
            "retires_total"
        )
        after = self.stage.agent_pids()
        if done or after != before:
            differ = len(before.items() ^ after.items())
            raise TransientError(
                f"expected no action, got {done:.0f}; {differ} agent processes started or ended"
            )
        return f"same verdicts, 0 actions, all {len(after)} agents kept running"
