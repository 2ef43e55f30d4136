"""Roll-outs that a query judges, on a whole fleet in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from nomad_watchdog.core.rollout_analysis import Analysis, QueryValue
from nomad_watchdog.core.rollout_steps import RolloutStep, Strategy
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.leases import SoleOwner
from tests.controllers.staged_fleet import CLASS, StagedFleet
from tests.controllers.test_rollout import Onlooker

QUERY = Analysis("http://prometheus", "errors", maximum=0.05, failures=3, interval_s=5.0)
STRATEGY = Strategy(
    steps=(RolloutStep(count=3, soak_s=20.0),), analysis=QUERY, progress_deadline_s=60.0
)


class Queried(StagedFleet):
    """Prometheus answers with `value`; `asked` counts the queries."""

    value = QueryValue(0.01)
    asked = 0

    async def read(self, of: Analysis) -> QueryValue:
        assert of is QUERY
        self.asked += 1
        return self.value

    async def tick(self) -> None:
        await super().tick()
        async with asyncio.TaskGroup() as group:
            self.rollouts.analyse(self.read, group)


async def queried(registry: SqliteRegistry, strategy: Strategy = STRATEGY) -> Queried:
    """Version 2 is rolled out; nothing was asked for version 1."""
    fleet = Queried(registry, strategy)
    await fleet.begin()
    assert fleet.asked == 0
    fleet.restart_control_plane("2")
    return fleet


async def test_a_value_within_its_limit_lets_the_steps_pass(registry: SqliteRegistry) -> None:
    """It is asked for in each interval, from the first device with the version on."""
    fleet = await queried(registry)
    began = fleet.site.clock.now
    await fleet.until(lambda: fleet.state() == "complete")
    assert 3 <= fleet.asked <= (fleet.site.clock.now - began) / QUERY.interval_s + 2


async def test_values_above_the_limit_take_the_version_back(registry: SqliteRegistry) -> None:
    """Three in a row do, although all devices are well; two with one below between them do not."""
    fleet = await queried(registry, replace(STRATEGY, steps=(RolloutStep(count=3, soak_s=90.0),)))
    await fleet.until(lambda: fleet.asked > 0)
    for value in (0.2, 0.2, 0.01, 0.2, 0.2):
        fleet.value, asked = QueryValue(value), fleet.asked
        await fleet.until(lambda: fleet.asked > asked)  # noqa: B023  # at once
    assert fleet.state() in ("running", "soaking")
    fleet.value = QueryValue(0.2)
    await fleet.until(lambda: fleet.state() == "aborted", 10)
    why = "the query returns 0.2, more than 0.05 (max), 3 times in a row (rollout.analysis)"
    assert fleet.requests.item(CLASS)["reason"] == why
    await fleet.until(lambda: not fleet.with_version("2"))


async def test_an_unreadable_query_waits_for_the_deadline(registry: SqliteRegistry) -> None:
    """The step does not pass, and says why; after `progress_deadline` the version is taken back."""
    fleet = await queried(registry)
    fleet.value = QueryValue(None, "no answer within 5 s")
    await fleet.until(lambda: fleet.asked > 0)
    for _ in range(50):
        await fleet.tick()
    item = fleet.requests.item(CLASS)
    assert (item["state"], item["step"]) == ("soaking", "step 1 of 2")
    assert "the query can't be read: no answer within 5 s (rollout.analysis)" in str(item["reason"])
    await fleet.until(lambda: fleet.state() == "aborted", 20)
    assert "can't be read" in str(fleet.requests.item(CLASS)["reason"])


async def test_an_unreadable_query_can_be_promoted_past(registry: SqliteRegistry) -> None:
    """An operator's word counts more than a query that can't be read."""
    fleet = await queried(registry)
    fleet.value = QueryValue(None, "no answer within 5 s")
    await fleet.until(lambda: fleet.asked > 4)
    await fleet.requests.control(CLASS, "promote-all", "me")
    await fleet.until(lambda: fleet.state() == "complete")


async def test_a_paused_roll_out_asks_nothing(registry: SqliteRegistry) -> None:
    """The time for which it could not be read before does not count after the pause."""
    fleet = await queried(registry)
    fleet.value = QueryValue(None, "HTTP 503")
    await fleet.until(lambda: fleet.asked > 0)
    for _ in range(30):
        await fleet.tick()
    await fleet.requests.control(CLASS, "pause", "me")
    asked = fleet.asked
    for _ in range(60):
        await fleet.tick()
    assert (fleet.asked, fleet.state()) == (asked, "paused")
    await fleet.requests.control(CLASS, "resume", "me")
    for _ in range(40):
        await fleet.tick()
    assert fleet.state() == "soaking"


async def test_only_the_leader_asks(registry: SqliteRegistry) -> None:
    """Another replica follows what the leader writes; the next leader asks itself."""
    fleet = await queried(registry)
    fleet.leases = Onlooker()
    fleet.restart_control_plane()
    for _ in range(30):
        await fleet.tick()
    assert fleet.asked == 0
    fleet.leases = SoleOwner()
    fleet.restart_control_plane()
    await fleet.until(lambda: fleet.state() == "complete")
    assert fleet.asked > 0


async def test_a_leader_that_comes_back_begins_to_count_anew(registry: SqliteRegistry) -> None:
    """Neither a failed query nor the time since it counts, as others have read the query meanwhile. Meanwhile it says
    who reads it."""
    fleet = await queried(registry)
    fleet.value = QueryValue(None, "no answer within 5 s")
    await fleet.until(lambda: fleet.asked > 0)
    await fleet.until(lambda: fleet.state() == "soaking")
    fleet.leases, asked = Onlooker(), fleet.asked
    fleet.rollouts._leases = fleet.leases
    for _ in range(int(2 * STRATEGY.progress_deadline_s)):
        await fleet.tick()
    assert (fleet.asked, fleet.state()) == (asked, "soaking")
    assert "the leader reads the query" in str(fleet.requests.item(CLASS)["reason"])
    fleet.rollouts._leases, fleet.value = SoleOwner(), QueryValue(0.01)
    await fleet.until(lambda: fleet.state() == "complete")


async def test_a_query_that_takes_long_delays_no_other(registry: SqliteRegistry) -> None:
    """While one is being read, it is not read a second time, and nothing waits for it."""
    fleet = await queried(registry)
    answer = asyncio.Event()

    async def slow(_of: Analysis) -> QueryValue:
        fleet.asked += 1
        await answer.wait()
        return QueryValue(0.01)

    async with asyncio.TaskGroup() as group:
        for _ in range(40):
            await StagedFleet.tick(fleet)
            fleet.rollouts.analyse(slow, group)
        await asyncio.sleep(0)
        assert fleet.asked == 1
        answer.set()
