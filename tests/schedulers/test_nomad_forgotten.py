"""Agents on a lost node for which Nomad has nothing left that ends the wait.

In memory, because a real server forgets the wait only if it is slow at a certain moment; row 45-forgotten takes the
evaluation from a real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from nomad_watchdog.clients.nomad import Answer
from nomad_watchdog.clients.nomad_features import NomadFeatures
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import DeniedError
from nomad_watchdog.model import Monotonic, PlacementState
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.schedulers.nomad._snapshots import AGAIN_S
from nomad_watchdog.schedulers.nomad._view import SECOND_LOOK_S, wait_forgotten
from nomad_watchdog.testing.conformance import record_of

RECORD = record_of("forgotten")
JOB = f"device-watchdog/dispatch-{RECORD.slug}-1-aaaaaaaa"


class SetClock(SystemClock):
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self) -> Monotonic:
        return Monotonic(self.now)


class LostNode:
    """Nomad with one agent, whose node does not answer."""

    def __init__(self) -> None:
        self.status = "unknown"
        self.follow_up = False
        """Whether Nomad will evaluate the job when the wait is over."""
        self.evaluated: list[str] = []

    async def features(self, *, again: bool = False) -> NomadFeatures:
        return NomadFeatures((1, 6, 3), exact=True)

    async def get(self, path: str, capability: str, params: Mapping[str, str]) -> Answer:
        raise DeniedError(f"{path} needs {capability}")

    async def pages(self, path: str, _capability: str, _params: Mapping[str, str]) -> Answer:
        rows: dict[str, list[dict[str, Any]]] = {
            "/v1/jobs": [
                {
                    "ID": JOB,
                    "Status": "running",
                    "Stop": False,
                    "Meta": {"device_id": RECORD.device.id, "slug": RECORD.slug, "epoch": "1"},
                }
            ],
            "/v1/allocations": [alloc(self.status)],
            "/v1/evaluations": [FOLLOW_UP] if self.follow_up else [],
        }
        return Answer(rows[path], 1)

    async def evaluate(self, ref: str) -> None:
        self.evaluated.append(ref)


FOLLOW_UP = {"JobID": JOB, "Status": "pending", "TriggeredBy": "max-disconnect-timeout"}


def alloc(status: str, desired: str = "run") -> Any:
    return {"ID": "a", "JobID": JOB, "ClientStatus": status, "DesiredStatus": desired}


@pytest.mark.parametrize(
    ("job", "allocs", "evals", "expected"),
    [
        ({"Stop": False}, [alloc("unknown")], [], True),
        ({"Stop": False}, [alloc("unknown"), alloc("running")], [], True),
        ({"Stop": False}, [alloc("unknown")], [FOLLOW_UP], False),
        ({"Stop": False}, [alloc("running")], [], False),
        ({"Stop": False}, [alloc("lost", "stop"), alloc("pending")], [], False),
        # An evaluation does not end the wait for an agent that was to be stopped.
        ({"Stop": False}, [alloc("unknown", "stop")], [], False),
        ({"Stop": True}, [alloc("unknown")], [], False),
        ({"Stop": False}, [], [], False),
    ],
)
def test_a_wait_is_forgotten_only_if_nothing_is_left_that_ends_it(
    job: Any, allocs: Any, evals: Any, expected: bool
) -> None:
    """It is forgotten if an agent that is to run is `unknown`, and no evaluation of its job is pending."""
    assert wait_forgotten(job, allocs, evals) is expected


async def test_a_forgotten_wait_is_evaluated_and_not_all_the_time() -> None:
    """A wait that Nomad has forgotten is evaluated after a while, and again only after a longer one (L1)."""
    nomad, clock = LostNode(), SetClock()
    scheduler = NomadScheduler(client=nomad, clock=clock)  # type: ignore[arg-type]

    async def evaluated_after(seconds: float) -> int:
        clock.now += seconds
        (found,) = (await scheduler.snapshot()).placements[RECORD.slug]
        assert (found.state is PlacementState.LOST) is (nomad.status == "unknown")
        await scheduler.prepare([])
        return len(nomad.evaluated)

    nomad.follow_up = True
    assert await evaluated_after(3600.0) == 0
    nomad.follow_up = False
    assert await evaluated_after(1.0) == 0
    assert await evaluated_after(SECOND_LOOK_S) == 1
    assert await evaluated_after(AGAIN_S - 1.0) == 1
    assert await evaluated_after(1.0) == 2
    nomad.status = "running"
    assert await evaluated_after(AGAIN_S) == 2
    assert set(nomad.evaluated) == {JOB}
