"""Log lines to Loki, as its push API requires (with a receiver that accepts nothing else)."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
from watchdog_agent.config.document import check
from watchdog_agent.reporting import loki as shipping
from watchdog_agent.runtime.loop import Loop

from nomad_watchdog.demo.process import free_port
from tests.agent.receiver import Receiver
from tests.agent.world import World, document, probe, until


@pytest_asyncio.fixture
async def loki() -> AsyncIterator[Receiver]:
    """A receiver that answers 204, like Loki."""
    it = Receiver()
    it.status = 204
    await it.start()
    yield it
    await it.stop()


def lines_of(loki: Receiver) -> list[dict[str, Any]]:
    """The log lines of all accepted pushes, each validated like in Loki's distributor."""
    found = []
    last = 0
    for one in loki.attempts:
        assert (one["method"], one["path"]) == ("POST", "/loki/api/v1/push")
        assert one["headers"]["content-type"] == "application/json"
        assert one["body"].keys() == {"streams"}
        (stream,) = one["body"]["streams"]
        assert stream["stream"].keys() == {"job", "agent_class", "version"}
        if one["status"] != 204:
            continue
        for at, line, about in stream["values"]:
            assert isinstance(at, str)
            assert isinstance(line, str)
            assert last < int(at) < (time.time() + 60) * 1e9
            assert all(isinstance(value, str) for value in about.values())
            assert about["device_id"] == "pump-7"
            last = int(at)
            found.append(json.loads(line))
    return found


async def test_lines_arrive_in_order_and_the_last_ones_at_the_end(
    world: World, loki: Receiver
) -> None:
    """Every line on stderr is in Loki too, in order and once, up to the signal that ends the agent."""
    agent = await world.started(loki={"url": f"http://127.0.0.1:{loki.port}", "tenant": "t1"})
    await until(lambda: lines_of(loki), "a first push")
    assert loki.attempts[0]["headers"]["x-scope-orgid"] == "t1"
    assert await agent.signal(signal.SIGTERM) == 143
    assert lines_of(loki) == agent.log
    assert lines_of(loki)[-1]["msg"] == "signal"


async def test_an_environment_variable_is_enough(world: World, loki: Receiver) -> None:
    """WATCHDOG_LOKI_URL enables shipping without a setting in the document."""
    agent = world.agent()
    agent.extra["WATCHDOG_LOKI_URL"] = f"http://127.0.0.1:{loki.port}"
    await agent.start()
    await until(lambda: lines_of(loki), "a push")


async def test_loki_that_is_busy_is_asked_again_and_told_nothing_twice(
    world: World, loki: Receiver
) -> None:
    """After a 429 the agent waits for Retry-After, and then all lines arrive once."""
    loki.status, loki.headers = 429, "Retry-After: 2\r\n"
    agent = await world.started(loki={"url": f"http://127.0.0.1:{loki.port}"})
    await until(lambda: loki.attempts, "a first push")
    refused_at = time.monotonic()
    loki.status = 204
    await until(lambda: lines_of(loki), "a second push", 60.0)
    assert time.monotonic() - refused_at >= 1.9
    assert lines_of(loki) == agent.log[: len(lines_of(loki))]
    assert (await agent.status())["logs"]["dropped"] == 0


async def test_what_loki_refuses_for_good_is_counted_and_not_repeated(
    world: World, loki: Receiver
) -> None:
    """A batch answered with 400 is not sent again, and the count is in /metrics."""
    loki.status = 400
    agent = await world.started(loki={"url": f"http://127.0.0.1:{loki.port}"})

    async def counted() -> bool:
        return (await agent.status())["logs"]["refused"] > 0

    await until(counted, "a refusal")
    refused = (await agent.status())["logs"]["refused"]
    assert f"log_lines_refused_total {refused}" in (await agent.get("/metrics"))[1]
    assert len(loki.attempts) == 1


async def test_loki_away_harms_nobody(world: World) -> None:
    """With Loki down the agent watches, reports, and ends in time."""
    agent = await world.started(loki={"url": f"http://127.0.0.1:{free_port()}"})
    await world.peer.saw("ready", ready=True)
    assert await agent.signal(signal.SIGTERM) == 143


def test_a_full_buffer_drops_the_oldest_and_counts() -> None:
    """Beyond MOST lines the oldest are dropped; memory stays bounded however long Loki is down."""
    config = check(document(probes=[probe(80)], loki={"url": "http://127.0.0.1:1"}))
    loop = Loop()
    shipper = shipping.LokiShipper(loop, config)
    for number in range(shipper.MAX_LINES + 7):
        shipper.put(str(number))
    loop.close()
    assert [line for _, line in shipper.lines] == [str(n) for n in range(7, shipper.MAX_LINES + 7)]
    assert shipper.dropped == 7
