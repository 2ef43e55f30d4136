"""Real input: 200 devices on a Nomad with two clients, two minutes of churn, then an audit.

Out of scope here: partitions and server crashes, which need more servers than one.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nomad_watchdog.demo.fleet import SimulatedFleet
from nomad_watchdog.demo.stage import Stage, open_stage
from nomad_watchdog.dev.process import free_port
from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import DeviceId, slug_of

from . import audit

pytestmark = [pytest.mark.servers, pytest.mark.long, pytest.mark.timeout(900)]

DEVICES = 200
CHURN_S = 120.0
COME_UP_S = 240.0
SETTLE_S = 120.0
OFF_IS_OVER_S = 15.0
"""So long after a device is on again its verdict may still say offline."""


@dataclass(slots=True)
class Watch:
    """What was seen of every device, once a second, and what must never be seen."""

    stage: Stage
    epochs: dict[str, int] = field(default_factory=dict)
    accepted: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    on_since: dict[str, float] = field(default_factory=dict)
    """Device → when it was switched on; without an entry it is off."""
    wrong: list[str] = field(default_factory=list)
    looks: int = 0

    async def run(self) -> None:
        while True:
            with suppress(TransientError):
                self.look(await self.stage.items())
            for one in audit.doubled(self.stage.root):
                self.wrong.append(f"S3: two agents at once, one of them {one}")
            await asyncio.sleep(1.0)

    def look(self, items: list[dict[str, Any]]) -> None:
        self.looks += 1
        for item in items:
            name, epoch = item["id"], item["epoch"]
            if epoch < self.epochs.get(name, 0):
                self.wrong.append(f"S1: epoch of {name} went from {self.epochs[name]} to {epoch}")
            self.epochs[name] = epoch
            if item["instance"]:
                self.accepted[name, epoch].add(item["instance"])
            on_since = self.on_since.get(name)
            on = on_since is not None and time.monotonic() - on_since > OFF_IS_OVER_S
            if item["verdict"] == "offline" and on:
                self.wrong.append(f"S6: {name} is called offline: {item['reason']}")


@dataclass(slots=True)
class Churn:
    """Two minutes of what a fleet does, from one seed."""

    stage: Stage
    fleet: SimulatedFleet
    watch: Watch
    chance: random.Random
    present: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    done: list[str] = field(default_factory=list)

    async def add(self, *names: str) -> None:
        for name in names:
            await self.fleet.add(name)
            self.watch.on_since[name] = time.monotonic()
        await self.register(*names)

    async def register(self, *names: str) -> None:
        await self._patiently(
            lambda: self.stage.register({n: self.fleet.devices[n].address for n in names})
        )
        self.present.update(names)
        self.known.update(names)

    async def leave(self, name: str) -> None:
        await self._patiently(lambda: self.stage.deregister(name))
        self.present.discard(name)

    async def switch(self, name: str, *, on: bool) -> None:
        if on:
            await self.fleet.devices[name].power_on()
            self.watch.on_since[name] = time.monotonic()
        else:
            self.watch.on_since.pop(name, None)
            await self.fleet.devices[name].power_off()

    async def _patiently(self, call: Any) -> None:
        # As any gateway: say it again until the answer is a 2xx; the API is away now and then.
        async with asyncio.timeout(60.0):
            while True:
                try:
                    return await call()
                except TransientError:
                    await asyncio.sleep(0.5)

    async def step(self) -> None:
        kind = self.chance.choice(
            ["kill", "kill", "leave", "vanish", "return", "reboot", "new", "again", "back"]
        )
        name = self.chance.choice(sorted(self.present))
        self.done.append(f"{kind} {name}")
        match kind:
            case "kill":
                slug = slug_of(DeviceId(name))
                for one in audit.processes(self.stage.root):
                    if one.slug == slug:
                        with suppress(ProcessLookupError):
                            os.kill(one.pid, signal.SIGKILL)
            case "leave":
                await self.leave(name)
            case "vanish":
                await self.switch(name, on=False)
            case "return":
                await self.switch(name, on=True)
            case "reboot":
                await self.switch(name, on=False)
                await asyncio.sleep(2.0)
                await self.switch(name, on=True)
            case "new":
                await self.add(f"new-{len(self.done):03}")
            case "again":
                await self.leave(name)
                await self.register(name)
            case "back":
                gone = sorted(self.known - self.present)
                if gone:
                    await self.register(self.chance.choice(gone))

    async def run(self, seconds: float) -> None:
        began = time.monotonic()
        marks = {
            seconds * 0.25: self.restart,
            seconds * 0.5: self.drain,
            seconds * 0.75: self.restart,
        }
        while (at := time.monotonic() - began) < seconds:
            for mark in [m for m in marks if m <= at]:
                await marks.pop(mark)()
            await self.step()
            await asyncio.sleep(self.chance.uniform(0.1, 1.0))

    async def restart(self) -> None:
        self.done.append("reconciler killed")
        assert self.stage.reconciler is not None
        await self.stage.reconciler.kill()
        await asyncio.sleep(2.0)
        await self.stage.start_reconciler()

    async def drain(self) -> None:
        self.done.append("second client drained")
        session = self.stage.session
        nodes = await audit.get(session, f"{self.stage.nomad}/v1/nodes")
        node = next(n for n in nodes if n["Name"].endswith("-1"))["ID"]
        url = f"{self.stage.nomad}/v1/node/{node}/drain"
        async with session.post(url, json={"DrainSpec": {"Deadline": 10_000_000_000}}) as answer:
            answer.raise_for_status()
        await asyncio.sleep(8.0)
        async with session.post(url, json={"DrainSpec": None, "MarkEligible": True}) as answer:
            answer.raise_for_status()


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    one = SimulatedFleet(network=7, port=free_port())
    yield one
    await one.close()


async def settled(stage: Stage, churn: Churn, timeout_s: float) -> list[str]:
    """Wait until every verdict is what the world is; what is not so at the end."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(TransientError):
            verdicts = {item["id"]: item["verdict"] for item in await stage.items()}
            late = []
            for name in churn.known:
                allowed = {"watched"} if name in churn.watch.on_since else {"offline", "suspect"}
                if name not in churn.present:
                    allowed = {"departed"}
                if verdicts.get(name) not in allowed:
                    late.append(f"L1: {name} is {verdicts.get(name)}, not {sorted(allowed)}")
            if not late:
                return []
            if time.monotonic() > deadline:
                return late
        await asyncio.sleep(0.5)


async def test_promises_hold_after_two_minutes_of_churn(
    tmp_path: Path, fleet: SimulatedFleet
) -> None:
    """Devices come, go, vanish, reboot and return, agents and the reconciler get kill -9, a node is
    drained: never two agents of one device at once, no false offline, and at the end exactly one agent a
    present device in the registry, Nomad, Consul and the process table."""
    seed = int(os.environ.get("WATCHDOG_SEED", "20251"))
    async with open_stage("nomad", tmp_path, fleet.port, clients=2) as stage:
        watch = Watch(stage)
        churn = Churn(stage, fleet, watch, random.Random(seed))
        await churn.add(*(f"device-{n:03}" for n in range(DEVICES)))
        watching = asyncio.ensure_future(watch.run())
        try:
            late = await settled(stage, churn, COME_UP_S)
            assert late == [], late[:5]
            await churn.run(CHURN_S)
            late = await settled(stage, churn, SETTLE_S)
            explained = [await explain(stage, line) for line in late[:3]]
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        wrong = late + watch.wrong
        wrong += [
            f"S1: {name} had {len(instances)} accepted instances at epoch {epoch}"
            for (name, epoch), instances in watch.accepted.items()
            if len(instances) > 1
        ]
        wrong += await still(stage, churn)

        assert wrong == [], (seed, churn.done, wrong[:20], explained)
        assert watch.looks > CHURN_S / 4
        # The auditor itself: a device that should not be there is three broken promises.
        name = min(churn.present)
        found = await audit.audit(
            stage.root, stage.consul, stage.nomad, churn.present - {name}, churn.known
        )
        assert sorted(line.split(":")[0] for line in found) == ["L1", "L1", "S4"]


async def still(stage: Stage, churn: Churn) -> list[str]:
    """The audit, again for a while: Consul asks each agent only every 10 s."""
    deadline = time.monotonic() + 60.0
    while True:
        wrong = await audit.audit(stage.root, stage.consul, stage.nomad, churn.present, churn.known)
        if not wrong or time.monotonic() > deadline:
            return wrong
        await asyncio.sleep(2.0)


async def explain(stage: Stage, line: str) -> Any:
    name = line.split()[1]
    with suppress(TransientError):
        return await stage.call("GET", f"/v1/devices/{name}/explain")
