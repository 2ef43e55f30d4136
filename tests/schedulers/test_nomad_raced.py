"""Racing starts on a Nomad whose token does not protect them, and jobs that it forgets to evaluate.

In memory, because a race on a real server cannot be forced into every order; the conformance suite
races a real one (`ensure_raced_is_one`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients.nomad import Answer
from nomad_watchdog.clients.nomad_features import NomadFeatures
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import DeniedError, TransientError
from nomad_watchdog.model import AgentSpec, Epoch, Monotonic, Placement, PlacementState
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.schedulers.nomad._view import SECOND_LOOK_S
from nomad_watchdog.testing.conformance import record_of

MOCK = str(Path(__file__).with_name("mock.nomad.hcl"))
SPEC = AgentSpec("default", "1", "h", template=MOCK)
RECORD = record_of("raced")


class SetClock(SystemClock):
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self) -> Monotonic:
        return Monotonic(self.now)


class OldNomad:
    """Nomad 1.6: it checks the token, later writes the job, and later the job's evaluation.

    Each step takes a random number of turns of the event loop."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.evaluated: set[str] = set()
        self.crashes_before_evaluation = False
        self._clock = 0
        self.index = 1
        """Index of the last write."""

    async def features(self, *, again: bool = False) -> NomadFeatures:
        return NomadFeatures((1, 6, 3), exact=True)

    async def get(self, path: str, capability: str, params: Mapping[str, str]) -> Answer:
        raise DeniedError(f"{path} needs {capability}")

    async def _some_turns(self) -> None:
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)

    async def dispatch(self, parent: str, body: Mapping[str, Any]) -> Answer:
        await self._some_turns()
        for job in self.jobs.values():
            if job["token"] == body["IdempotencyToken"]:
                return Answer({"DispatchedJobID": job["ID"], "EvalID": ""}, 1)
        self._clock += self._random.randrange(2)  # two jobs may have the same time
        stamp = self._clock
        await self._some_turns()  # the leader stamps first and writes later: order may change
        suffix = f"1-{self._random.randrange(1 << 32):08x}"
        name = f"{parent}/dispatch-{body['IdPrefixTemplate']}-{suffix}"
        self.index += 1
        self.jobs[name] = {
            "ID": name,
            "SubmitTime": stamp,
            "Meta": body["Meta"],
            "Stop": False,
            "Status": "pending",
            "token": body["IdempotencyToken"],
        }
        if self.crashes_before_evaluation:
            self.crashes_before_evaluation = False
            raise TransientError("the leader is gone")
        self.evaluated.add(name)
        await self._some_turns()
        return Answer({"DispatchedJobID": name, "EvalID": "e"}, 1)

    async def pages(self, path: str, _capability: str, params: Mapping[str, str]) -> Answer:
        await self._some_turns()
        if path == "/v1/jobs":
            rows = [
                dict(job) for name, job in self.jobs.items() if name.startswith(params["prefix"])
            ]
        elif path == "/v1/evaluations":
            rows = [{"JobID": name, "Status": "pending"} for name in self.evaluated]
        else:
            rows = []
        index = self.index
        await self._some_turns()
        return Answer(rows, index)

    async def deregister(self, ref: str) -> None:
        await self._some_turns()
        self.index += 1
        self.jobs[ref]["Stop"] = True

    async def evaluate(self, ref: str) -> None:
        self.evaluated.add(ref)

    def oldest(self) -> dict[str, Any]:
        """The job that the planner keeps."""
        return min(self.jobs.values(), key=lambda one: (one["SubmitTime"], one["ID"]))


def scheduler_on(nomad: OldNomad, clock: SetClock | None = None) -> NomadScheduler:
    return NomadScheduler(client=nomad, clock=clock)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(0, 600, 200))
async def test_of_raced_starts_only_the_oldest_is_left(seed: int) -> None:
    """Whatever the order in which racers create and list jobs, exactly the oldest job is left
    (S2)."""
    most = 0
    for number in range(seed, seed + 200):
        nomad = OldNomad(number)
        racers = [scheduler_on(nomad).ensure(RECORD, Epoch(1), SPEC) for _ in range(2 + number % 6)]
        await asyncio.gather(*racers)
        left = [one["ID"] for one in nomad.jobs.values() if not one["Stop"]]
        assert left == [nomad.oldest()["ID"]]
        most = max(most, len(nomad.jobs))
    assert most > 4  # otherwise there was no race


@pytest.mark.parametrize("seed", range(0, 600, 200))
async def test_a_racer_that_dies_never_stops_the_oldest(seed: int) -> None:
    """A racer cancelled at any await may leave its own job behind, but the oldest stays (S2)."""
    died = 0
    for number in range(seed, seed + 200):
        nomad = OldNomad(number)
        racers = [
            asyncio.ensure_future(scheduler_on(nomad).ensure(RECORD, Epoch(1), SPEC))
            for _ in range(2 + number % 4)
        ]
        for _ in range(number % 9):
            await asyncio.sleep(0)
        racers[0].cancel()
        _, *others = await asyncio.gather(*racers, return_exceptions=True)
        assert not [one for one in others if isinstance(one, BaseException)]
        died += racers[0].cancelled()
        assert not nomad.oldest()["Stop"]
    assert died


async def test_the_planner_and_the_backend_keep_the_same_job() -> None:
    """The backend keeps the same job that the planner would keep."""
    nomad = OldNomad()
    for submitted, suffix in ((2, "b"), (1, "d"), (1, "c")):
        name = f"device-watchdog/dispatch-{RECORD.slug}-1-{suffix * 8}"
        body = {"device_id": RECORD.device.id, "slug": RECORD.slug, "epoch": "1"}
        nomad.jobs[name] = {
            "ID": name, "SubmitTime": submitted * 10**9, "Meta": body, "Stop": False,
            "Status": "pending", "token": f"{RECORD.slug}:1",
        }  # fmt: skip
    index = await scheduler_on(nomad).ensure(RECORD, Epoch(1), SPEC)
    assert index == nomad.index  # of the last stop: a plan based on it never sees two running
    snapshot = await scheduler_on(nomad).snapshot()
    kept = min(snapshot.placements[RECORD.slug], key=lambda one: (one.created_at, one.ref))
    assert kept.ref.endswith("c" * 8)
    assert [one["ID"] for one in nomad.jobs.values() if not one["Stop"]] == [kept.ref]


async def test_a_repeated_start_evaluates_what_the_server_forgot() -> None:
    """If a server crashes between a job and its evaluation, no job waits for ever."""
    nomad = OldNomad()
    nomad.crashes_before_evaluation = True
    await scheduler_on(nomad).ensure(RECORD, Epoch(1), SPEC)
    assert nomad.jobs.keys() == nomad.evaluated


async def test_a_successor_evaluates_what_the_server_forgot() -> None:
    """If the control plane died as well, its successor finds the job in a snapshot, and has it
    evaluated only after it has been in this state for a while."""
    nomad, clock = OldNomad(), SetClock()
    nomad.crashes_before_evaluation = True
    body = {
        "Meta": {"device_id": RECORD.device.id, "slug": RECORD.slug, "epoch": "1"},
        "IdempotencyToken": f"{RECORD.slug}:1",
        "IdPrefixTemplate": RECORD.slug,
    }
    with pytest.raises(TransientError):
        await nomad.dispatch("device-watchdog", body)
    successor = scheduler_on(nomad, clock)
    found = await _only(successor)
    assert found.state is PlacementState.PENDING
    await successor.prepare([])
    assert not nomad.evaluated
    clock.now += SECOND_LOOK_S
    await successor.prepare([])
    assert nomad.evaluated == {found.ref}


async def _only(scheduler: NomadScheduler) -> Placement:
    (found,) = (await scheduler.snapshot()).placements[RECORD.slug]
    return found
