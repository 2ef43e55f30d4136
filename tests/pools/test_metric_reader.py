"""A metric is one number, or none with a reason; never a 0 that was not reported."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.config.pools import MetricSettings, PoolSettings
from nomad_watchdog.pools import Usage
from nomad_watchdog.pools.metric_reader import MetricReader, number_at

TREE = {"streams": [{"name": "a", "n": 1}, {"name": "b.c", "n": 2.5}], "deep": [[3, 4]], "ok": True}


@pytest.mark.parametrize(
    ("path", "number"),
    [("streams[0].n", 1), ("streams[name=b.c].n", 2.5), ("deep[0][1]", 4)],
)
def test_a_path_leads_to_its_number(path: str, number: float) -> None:
    """Keys, positions, and selections by a key's value."""
    assert number_at(TREE, path) == number


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("streams[2].n", r"no value at streams\[2\]"),
        ("streams[name=z].n", "no value at streams"),
        ("stream", "no value at stream"),
        ("ok", "no number at ok"),
        ("streams", "no number"),
        ("deep.x", "no value at deep.x"),
    ],
)
def test_a_path_to_nowhere_says_where_it_ends(path: str, said: str) -> None:
    """A missing step, and a value that is not a number, are errors."""
    with pytest.raises(ValueError, match=said):
        number_at(TREE, path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=1), inner)
        ),
    )
)
def test_any_document_gives_a_number_or_a_refusal(document: object) -> None:
    """Whatever a page answers, the only exception is ValueError."""
    try:
        assert isinstance(number_at(document, "a[0].b[x=y].a"), float)
    except ValueError:
        return


class Drive:
    """A driver that knows only the usage of its workers."""

    used: Usage | None = Usage(80.0, 20.0)

    async def usage(self, name: str, pool: PoolSettings) -> Usage | None:
        return self.used


@pytest.fixture
async def page() -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """An address that returns the value of "answer", and records its requests."""
    told: dict[str, Any] = {"answer": {}, "status": 200}

    async def handle(request: web.Request) -> web.Response:
        told["asked"] = (request.path, dict(request.query), request.headers.get("Authorization"))
        await asyncio.sleep(told.get("wait", 0.0))
        text = told["answer"] if isinstance(told["answer"], str) else json.dumps(told["answer"])
        return web.Response(text=text, status=told["status"])

    app = web.Application()
    app.router.add_get("/{any:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}", told
    await runner.cleanup()


async def read(metric: Mapping[str, Any], drive: Drive | None = None) -> tuple[float | None, str]:
    pool = PoolSettings(command=("x",), max=3, metric=(MetricSettings(**metric),))
    gauge = MetricReader(drive or Drive(), lambda: {"offline": 7})  # type: ignore[arg-type]
    try:
        found = await gauge.read("p", pool)
    finally:
        await gauge.close()
    return found.value, found.reason


def vector(*values: str) -> dict[str, Any]:
    rows = [{"metric": {"i": str(n)}, "value": [0, value]} for n, value in enumerate(values)]
    return {"status": "success", "data": {"resultType": "vector", "result": rows}}


async def test_prometheus_is_asked_with_the_query_and_the_token(
    page: tuple[str, dict[str, Any]], tmp_path: Any
) -> None:
    """The instant query of the HTTP API is sent with the file's token."""
    address, told = page
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    told["answer"] = vector("12.5")
    metric = {"kind": "prometheus", "url": address, "query": "sum(q)", "target": 1.0}

    assert await read(metric | {"token_file": str(token)}) == (12.5, "")
    assert told["asked"] == ("/api/v1/query", {"query": "sum(q)"}, "Bearer s3cret")


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (vector(), 200, "0 series"),
        (vector("1", "2"), 200, "2 series; expected 1"),
        (vector("NaN"), 200, "nan"),
        ({"status": "error", "error": "bad query"}, 200, "bad query"),
        ({"data": {}}, 200, "not from Prometheus"),
        ("<html>", 200, "not JSON"),
        ("[" * 200_000, 200, "not JSON"),
        ("1" * 400, 200, "not JSON"),
        ({}, 503, "HTTP 503"),
        ({}, 302, "HTTP 302"),
    ],
)
async def test_what_prometheus_does_not_say_is_no_number(
    page: tuple[str, dict[str, Any]], answer: object, status: int, said: str
) -> None:
    """No series, too many, NaN and errors are no value, and the reason says which."""
    address, told = page
    told |= {"answer": answer, "status": status}
    value, reason = await read({"kind": "prometheus", "url": address, "query": "q", "target": 1.0})

    assert value is None
    assert said in reason


async def test_a_queue_is_read_by_its_path_and_query(page: tuple[str, dict[str, Any]]) -> None:
    """The address keeps its query, and the number is found in the answer."""
    address, told = page
    told["answer"] = {"streams": [{"name": "jobs", "state": {"messages": 41}}]}
    url = f"{address}/jsz?streams=true"
    metric = {"kind": "queue", "url": url, "value": "streams[name=jobs].state.messages"}

    assert await read(metric | {"target": 1.0}) == (41.0, "")
    assert told["asked"][:2] == ("/jsz", {"streams": "true"})


async def test_nobody_who_answers_is_no_number() -> None:
    """A closed port is no value, with a reason, and no exception."""
    value, reason = await read(
        {"kind": "queue", "url": "http://127.0.0.1:9/x", "value": "a", "target": 1.0}
    )

    assert value is None
    assert reason.startswith("queue: ")


async def test_a_slow_server_is_waited_for_no_longer_than_the_time_out(
    page: tuple[str, dict[str, Any]],
) -> None:
    """An answer that arrives after `timeout` is no value."""
    address, told = page
    told |= {"wait": 1.0, "answer": {"a": 1}}
    value, reason = await read(
        {"kind": "queue", "url": address, "value": "a", "target": 1.0, "timeout": 0.2}
    )

    assert (value, reason) == (None, "queue: no answer within 0.2 s")


async def test_usage_and_devices_are_read_where_they_are_known() -> None:
    """CPU and memory come from the driver, devices from the fleet; without usage there is no number."""
    drive = Drive()
    assert await read({"kind": "cpu", "target": 1.0}, drive) == (80.0, "")
    assert await read({"kind": "memory", "target": 1.0}, drive) == (20.0, "")
    assert await read({"kind": "devices", "verdict": "offline", "target": 1.0}) == (7.0, "")
    drive.used = None
    assert (await read({"kind": "cpu", "target": 1.0}, drive))[0] is None
