"""200 watched devices move from a real Nomad to a real Kubernetes control plane.

Pods run as processes (`servers/kubelet/__main__.py`); a lost scheduler is simulated in
`tests/controllers/migration`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.process import clean_environment, free_port
from nomad_watchdog.demo.stage import Stage, open_stage
from nomad_watchdog.errors import TransientError
from tests.e2e import audit

pytestmark = [pytest.mark.servers, pytest.mark.busy, pytest.mark.timeout(900)]

DEVICES = 200
PART = 40
COME_UP_S = 240.0
PODS = "/api/v1/namespaces/nomad-watchdog/pods"
DEPLOYMENTS = "/apis/apps/v1/namespaces/nomad-watchdog/deployments"
STOP_S = 5.0 + 2.0 + 5.0
"""kill_timeout, the second check of a dead job, and a resync in case the first event is lost."""
START_S = 18.0
"""From the dispatch to the first accepted report, with two cores for everything."""


@dataclass
class Watch:
    """What the API reports for every device, several times per second, and any violations."""

    stage: Stage
    wrong: list[str] = field(default_factory=list)
    epochs: dict[str, int] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    looks: int = 0
    blind: bool = False
    """The control plane is down, or was until now: a device without an accepted agent says nothing
    about a move."""
    _accepted: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)
    _spoiled: set[str] = field(default_factory=set)

    async def run(self) -> None:
        while True:
            with suppress(TransientError):
                self.look(await self.stage.items())
            for one in audit.doubled(self.stage.root):
                self.wrong.append(f"S3: two agents at once, one of them {one}")
            await asyncio.sleep(0.3)

    def look(self, items: list[dict[str, Any]]) -> None:
        self.looks += 1
        now = time.monotonic()
        for item in items:
            name, epoch, instance = item["id"], item["epoch"], item["instance"]
            if epoch < self.epochs.get(name, 0):
                self.wrong.append(f"S1: epoch of {name} went back to {epoch}")
            self.epochs[name] = epoch
            if item["verdict"] == "offline":
                self.wrong.append(f"S6: {name} is called offline: {item['reason']}")
            if not instance:
                self._since.setdefault(name, now)
                continue
            seen = self._accepted.setdefault((name, epoch), set())
            seen.add(instance)
            if len(seen) > 1:
                self.wrong.append(f"S1: {name} had {seen} at epoch {epoch}")
            if name in self._since:
                gap = now - self._since.pop(name)
                if name not in self._spoiled and not self.blind:
                    self.gaps.append(gap)
                self._spoiled.discard(name)
        if self.blind:
            self._spoiled.update(self._since)


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[SimulatedFleet]:
    one = SimulatedFleet(network=9, port=free_port())
    yield one
    await one.close()


async def verb(stage: Stage, *words: str, code: int = 0) -> Any:
    """The output of `nomad-watchdog WORDS -o json`; the program must end with `code`."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nomad_watchdog", "--config", str(stage.config), *words, "-o", "json",
        env=clean_environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await child.communicate()
    assert child.returncode == code, (words, out[-500:], err[-500:])
    return json.loads(out) if out.strip() else err.decode()


async def until(what: str, seconds: float, call: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + seconds
    said: object = None
    while time.monotonic() < deadline:
        with suppress(TransientError):
            said = await call()
            if said:
                return said
        await asyncio.sleep(0.3)
    raise AssertionError(f"{what}: not within {seconds:.0f} s; last {said!r}")


async def move_of(stage: Stage) -> dict[str, Any]:
    answer: dict[str, Any] = await stage.call("GET", "/v1/migration")
    newest: dict[str, Any] = answer["items"][-1]
    return newest


async def test_200_devices_move_to_kubernetes_and_some_back(
    tmp_path: Path, fleet: SimulatedFleet
) -> None:
    """A part moves and is undone halfway; then all move, with a pause and a `kill -9` of the
    reconciler in the middle. A device never has two agents, none is falsely offline, and none lacks
    an accepted agent for longer than a stop and a start. At the end each device has one agent, all
    on Kubernetes, in every store. A reconciler started with the new `backend` moves nothing."""
    names = [f"device-{n:03}" for n in range(DEVICES)]
    async with open_stage("nomad", tmp_path, fleet.port, beside=True) as stage:
        assert stage.cluster is not None
        client = stage.cluster.client()
        watch = Watch(stage)
        watching = asyncio.ensure_future(watch.run())

        async def moved(state: str, at_least: int = 0) -> bool:
            now = await move_of(stage)
            return now["state"] == state and now["ready"] >= at_least

        async def all_watched() -> bool:
            counts = Counter(item["verdict"] for item in await stage.items())
            return counts["watched"] == DEVICES

        try:
            for name in names:
                await fleet.add(name)
            part = [{"id": n, "address": fleet.devices[n].address} for n in names]
            for number, item in enumerate(part):
                item |= {"class": "default", "labels": {"part": "a" if number < PART else "b"}}
            await stage.call("POST", "/v1/devices:bulk", {"devices": part})
            await until("all come up", COME_UP_S, all_watched)
            watch.gaps.clear()

            told = await verb(
                stage, "migrate", "--from", "nomad", "--to", "kubernetes", "--selector", "part=a",
                "--dry-run",
            )  # fmt: skip
            assert (told["to_move"], told["devices"]) == (PART, PART)
            assert (await verb(stage, "migrate", "status"))["items"] == []

            # Move a part, and half of that back.
            some = ("--from", "nomad", "--to", "kubernetes", "--selector", "part=a")
            await verb(stage, "migrate", *some, "--at-once", "10")
            await verb(stage, "migrate", *some, code=75)  # one at a time
            await until("some have moved", 120.0, lambda: moved("running", PART // 4))
            assert (await verb(stage, "migrate", "undo"))["state"] == "undoing"
            await until("they are back", 180.0, lambda: moved("undone", PART))
            wrong = await audited(stage, client, names)
            assert wrong == [], wrong[:10]
            assert (await client.list(DEPLOYMENTS)).items == ()

            # Move all, with a pause and a kill -9.
            await verb(stage, "migrate", "--from", "nomad", "--to", "kubernetes")
            await until("a quarter", 240.0, lambda: moved("running", DEVICES // 4))
            assert (await verb(stage, "migrate", "pause"))["state"] == "paused"

            async def arrived() -> bool:
                now = await move_of(stage)
                return now["there"] == now["ready"] and now["ending"] == 0

            await until("those on their way arrive", 120.0, arrived)
            there = (await move_of(stage))["there"]
            await asyncio.sleep(3.0)
            assert (await move_of(stage))["there"] == there < DEVICES
            assert (await verb(stage, "migrate", "resume"))["state"] == "running"
            await until("a half", 240.0, lambda: moved("running", DEVICES // 2))
            watch.blind = True
            assert stage.reconciler is not None
            await stage.reconciler.kill()
            await asyncio.sleep(1.0)
            await stage.start_reconciler(120.0)
            await until("all are heard again", 120.0, all_ready_of(stage))
            watch.blind = False
            await until("all have moved", 400.0, lambda: moved("done", DEVICES))

            wrong = await audited(stage, client, names)
            assert wrong == [], wrong[:10]
            pods = {one["metadata"]["uid"] for one in (await client.list(PODS)).items}
            assert len(pods) == DEVICES
            assert max(watch.gaps) <= STOP_S + START_S, sorted(watch.gaps)[-5:]
            gaps = sorted(watch.gaps)
            print(f"{len(gaps)} gaps: p50 {gaps[len(gaps) // 2]:.1f} s, longest {gaps[-1]:.1f} s")

            # The remaining steps are reported, and carried out without a move.
            hint = (await stage.call("GET", "/v1/status"))["migration"]["hint"]
            assert 'backend = "kubernetes"' in hint
            text = stage.config.read_text()
            stage.config.write_text(text.replace('"nomad"', '"kubernetes"', 1))
            await stage.reconciler.terminate(10.0)
            await stage.start_reconciler(120.0)
            await asyncio.sleep(8.0)
            assert "migration" not in await stage.call("GET", "/v1/status")
            assert {o["metadata"]["uid"] for o in (await client.list(PODS)).items} == pods
            wrong = await audited(stage, client, names)
            assert wrong == [], wrong[:10]
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await client.close()
    assert watch.wrong == [], watch.wrong[:10]
    assert watch.looks > 50


def all_ready_of(stage: Stage) -> Callable[[], Any]:
    """No device is unwatched after a restart: every agent has reported to the new process that it
    is ready."""

    async def ready() -> bool:
        verdicts = Counter(item["verdict"] for item in await stage.items())
        return verdicts["unwatched"] == 0 and (await move_of(stage))["ready"] > DEVICES // 2

    return ready


async def audited(stage: Stage, client: Any, names: list[str]) -> list[str]:
    """What does not hold in every store; repeated for a minute, as Consul checks agents every 10 s
    only."""
    where = audit.Where(stage.root, stage.consul, stage.nomad)
    deadline = time.monotonic() + 60.0
    while True:
        objects, pods = (await client.list(DEPLOYMENTS)).items, (await client.list(PODS)).items
        wrong = await audit.audit_both(where, objects, pods, names, names)
        if not wrong or time.monotonic() > deadline:
            return wrong
        await asyncio.sleep(2.0)
