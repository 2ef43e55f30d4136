"""Churn for tests: devices are added, removed, vanish, reboot and return, and agents and the
control plane are killed. Devices are observed meanwhile, and audited at the end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.stage import Stage
from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import DeviceId, slug_of
from tests.e2e import audit

Audit = Callable[[AbstractSet[str]], Awaitable[list[str]]]
"""What does not hold if these devices should have agents."""
SEED: Final = int(os.environ.get("WATCHDOG_SEED", "20251"))
COME_UP_S: Final = 240.0
SETTLE_S: Final = 120.0
AUDIT_S: Final = 60.0
"""Consul checks each agent only every 10 s."""
OFF_IS_OVER_S: Final = 15.0
"""For this time after a device is on again its verdict may still be offline."""


@dataclass(slots=True)
class Watch:
    """The observed state of every device, once per second, and any violations."""

    stage: Stage
    epochs: dict[str, int] = field(default_factory=dict)
    accepted: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    on_since: dict[str, float] = field(default_factory=dict)
    """Device → when it was switched on; a device without an entry is off."""
    wrong: list[str] = field(default_factory=list)
    looks: int = 0
    may_double_until: float = 0.0
    may_double: AbstractSet[str] = frozenset()
    """S3: until then (monotonic) a node is lost, and its agents (of these devices, by slug) may run
    beside their successors."""

    async def run(self) -> None:
        while True:
            with suppress(TransientError):
                self.look(await self.stage.items())
            excused = time.monotonic() < self.may_double_until
            for one in audit.doubled(self.stage.root):
                if excused and one.slug in self.may_double:
                    continue
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
    """Two minutes of typical fleet activity, from one seed."""

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
        # Like any gateway: retry until the answer is a 2xx, because the API is unavailable now and
        # then.
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
                paused = time.monotonic()
                await marks.pop(mark)()
                began += time.monotonic() - paused  # this time does not count as churn
            await self.step()
            await asyncio.sleep(self.chance.uniform(0.1, 1.0))
        assert not marks, f"never played: {marks}"

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


async def settled(stage: Stage, churn: Churn, timeout_s: float) -> list[str]:
    """Wait until every verdict matches reality; returns those that do not in the end."""
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(TransientError):
            verdicts = {item["id"]: item["verdict"] for item in await stage.items()}
            late = []
            for name in churn.known:
                # a device that has never answered an agent is not called offline
                off = {"offline", "suspect", "unwatched"}
                allowed = {"watched"} if name in churn.watch.on_since else off
                if name not in churn.present:
                    allowed = {"departed"}
                if verdicts.get(name) not in allowed:
                    late.append(f"L1: {name} is {verdicts.get(name)}, not {sorted(allowed)}")
            if not late:
                return []
            if time.monotonic() > deadline:
                return late
        await asyncio.sleep(0.5)


async def play(
    churn: Churn, audited: Audit, *, devices: int, churn_s: float, instances: int
) -> None:
    """Start `devices`, churn for `churn_s` seconds, settle and audit. `instances`: maximum number
    of accepted instances per epoch. Raises AssertionError with the seed and all violations."""
    stage, watch = churn.stage, churn.watch
    await churn.add(*(f"device-{n:03}" for n in range(devices)))
    watching = asyncio.ensure_future(watch.run())
    try:
        late = await settled(stage, churn, COME_UP_S)
        assert late == [], late[:5]
        await churn.run(churn_s)
        late = await settled(stage, churn, SETTLE_S)
        explained = [await explain(stage, line) for line in late[:3]]
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    wrong = late + watch.wrong
    wrong += [
        f"S1: {name} had {len(seen)} accepted instances at epoch {epoch}"
        for (name, epoch), seen in watch.accepted.items()
        if len(seen) > instances
    ]
    wrong += await still(churn, audited)
    assert wrong == [], (SEED, churn.done, wrong[:20], explained)
    assert watch.looks > churn_s / 4


async def still(churn: Churn, audited: Audit) -> list[str]:
    """The audit, repeated for up to AUDIT_S until nothing is wrong."""
    deadline = time.monotonic() + AUDIT_S
    while True:
        wrong = await audited(churn.present)
        if not wrong or time.monotonic() > deadline:
            return wrong
        await asyncio.sleep(2.0)


async def explain(stage: Stage, line: str) -> Any:
    name = line.split()[1]
    with suppress(TransientError):
        return await stage.call("GET", f"/v1/devices/{name}/explain")
