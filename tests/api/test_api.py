from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import openapi_spec_validator
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nomad_watchdog.api import Runner, body, make_app, openapi
from nomad_watchdog.api import status_page as page
from nomad_watchdog.api.events import MAX_FOLLOWERS
from nomad_watchdog.api.routes import ROUTES
from nomad_watchdog.core.incidents import GroupKind
from nomad_watchdog.errors import ConflictError, TransientError
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import Condition, ConditionState, Presence, WallTime
from tests.api.conftest import ServedApi
from tests.fixed_loop import FixedLoop

WISH: dict[str, Any] = {"class": "default", "address": "127.0.0.1", "labels": {"site": "a"}}


async def test_put_get_delete(served_api: ServedApi) -> None:
    """A PUT creates a device once, then reports it as unchanged; DELETE removes it, and a later PUT creates it
    again."""
    path = "/v1/devices/cam-1"
    assert (await served_api.ask("GET", path))[0] == 404
    assert (await served_api.ask("PUT", path, json=WISH))[0] == 201
    status, again = await served_api.ask("PUT", path, json=WISH)
    assert (status, again["changed"]) == (200, False)
    status, item = await served_api.ask("GET", path)
    assert status == 200
    assert item["labels"] == {"site": "a"}
    assert item["class"] == "default"
    assert (await served_api.ask("POST", path + "/heartbeat"))[0] == 204
    status, gone = await served_api.ask("DELETE", path)
    assert (status, gone["presence"]) == (200, "absent")
    assert (await served_api.ask("PUT", path, json=WISH))[0] == 201
    assert (await served_api.ask("DELETE", "/v1/devices/never"))[0] == 404
    assert (await served_api.ask("POST", "/v1/devices/never/heartbeat"))[0] == 404


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "100%",
        "%2F",
        "..",
        ".",
        "käse 端",
        "a?b#c",
        "{id}",
        "x:bulk",
        "<script>",
        "a+b",
        "../../x",
    ],
)
async def test_s11_ids_round_trip_through_paths(served_api: ServedApi, name: str) -> None:
    """Any printable ID is stored, returned exactly as sent, and can be explained."""
    path = "/v1/devices/" + quote(name, safe="").replace(".", "%2E")
    status, body = await served_api.ask("PUT", path, json=WISH)
    assert (status, body["id"]) == (201, name)
    assert (await served_api.ask("GET", path))[1]["id"] == name
    status, body = await served_api.ask("GET", path + "/explain")
    assert (status, body["id"]) == (200, name)


HOSTILE: list[tuple[Any, str]] = [
    (b"{", "line 1"),
    (b"", "JSON"),
    (b"\xff\xfe", "JSON"),
    (b"[" * 5000, "JSON"),
    (b"[]", "object"),
    (b"null", "object"),
    (
        {"address": "a", "colour": 1},
        "colour: no such field; allowed here: class, address, labels, ttl",
    ),
    ({"address": 7}, "address"),
    ({}, "address"),
    ({"address": "a b"}, "blank"),
    ({"address": "a\u001b[2J"}, "blank or control"),
    ({"address": "a" * 254}, "253"),
    ({"address": "a", "labels": {str(n): "" for n in range(33)}}, "32"),
    ({"address": "a", "labels": {"k": "é" * 65}}, "128"),
    ({"address": "a", "labels": {"k": 1}}, "labels.k"),
    ({"address": "a", "class": ""}, "class"),
    (b'{"address":"\\ud800"}', "JSON"),
]


@pytest.mark.parametrize(("body", "says"), HOSTILE)
async def test_hostile_bodies_are_refused_with_words(
    served_api: ServedApi, body: Any, says: str
) -> None:
    """Each invalid body is answered 400 with a message that names what is wrong, and stores nothing."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = await served_api.ask(
        "PUT", "/v1/devices/x", data=data, headers={"Content-Type": "application/json"}
    )
    assert status == 400
    assert says in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]
    assert served_api.fleet.views.device(slug_of("x")) is None  # type: ignore[arg-type]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["id", "devices", "delete", "event", "device", "v", "epoch"]), inner
            )
        ),
        max_leaves=8,
    ),
    path=st.sampled_from(["/v1/devices:bulk", "/v1/webhook", "/v1/agents/report"]),
)
def test_no_body_breaks_the_schemas(body: Any, path: str) -> None:
    """No JSON value makes a schema raise any exception but its own error."""
    from pydantic import BaseModel, ValidationError

    from nomad_watchdog.api.schemas import BulkIn, ReportIn, WebhookIn
    from nomad_watchdog.device_fields import problem

    model: dict[str, type[BaseModel]] = {
        "/v1/devices:bulk": BulkIn,
        "/v1/webhook": WebhookIn,
        "/v1/agents/report": ReportIn,
    }
    try:
        model[path].model_validate_json(json.dumps(body))
    except ValidationError as error:
        assert problem(error, model[path])


async def test_refusals_of_form(served_api: ServedApi) -> None:
    """An invalid size, type, encoding, method, path, ID or query is a 4xx JSON answer with its own code."""
    put = {"Content-Type": "application/json"}
    x = "/v1/devices/x"
    big = json.dumps({"address": "a" * 70_000})
    cases: list[tuple[int, str, str, dict[str, Any]]] = [
        (413, "PUT", x, {"data": big, "headers": put}),
        (415, "PUT", x, {"data": "{}", "headers": {"Content-Type": "text/plain"}}),
        (415, "PUT", x, {"data": b"x", "headers": {**put, "Content-Encoding": "gzip"}}),
        (405, "PATCH", x, {}),
        (404, "GET", "/v2", {}),
        (400, "GET", "/v1/devices/%00", {}),
        (400, "GET", "/v1/devices/%FF", {}),
        (400, "GET", "/v1/devices/" + "a" * 129, {}),
        (400, "GET", "/v1/devices?colour=red", {}),
        (400, "GET", "/v1/devices?limit=0", {}),
        (400, "GET", "/v1/devices?limit=1001", {}),
        (400, "GET", "/v1/devices?verdict=fine", {}),
        (400, "GET", "/v1/devices?cursor=%21", {}),
        (400, "GET", "/v1/devices?label=x", {}),
        (400, "GET", "/v1/events?since=-1", {}),
        (403, "DELETE", x, {"headers": {"Sec-Fetch-Site": "cross-site"}}),
    ]
    for expected, method, path, options in cases:
        status, body = await served_api.ask(method, path, **options)
        assert status == expected, (path, body)
        assert set(body["error"]) == {"code", "message"}


async def test_list_pages_stay_stable_under_inserts(served_api: ServedApi) -> None:
    """A walk through the pages lists every device once, even if devices are added meanwhile."""
    names = [f"d{n:02}" for n in range(0, 20, 2)]
    await served_api.ask(
        "POST", "/v1/devices:bulk", json={"devices": [{"id": n, **WISH} for n in names]}
    )
    seen: list[str] = []
    path = "/v1/devices?limit=3&label=site%3Da&q=D"
    following: str | None = ""
    while following is not None:
        _, page = await served_api.ask("GET", path + (f"&cursor={following}" if following else ""))
        seen += [item["id"] for item in page["items"]]
        following = page["next"]
        await served_api.ask("PUT", f"/v1/devices/a{len(seen)}", json=WISH)
    assert seen == names
    _, page = await served_api.ask("GET", "/v1/devices?label=site%3Db")
    assert page["items"] == []


async def test_bulk_answers_each_item(served_api: ServedApi) -> None:
    """Valid items are stored even if others are invalid, duplicate or unknown; each item has its own result."""
    body = {
        "devices": [{"id": "a", **WISH}, {"id": "b"}, 7, {"id": "a", **WISH}, {"id": "c", **WISH}],
        "delete": ["c", "gone", "", 3],
    }
    status, answer = await served_api.ask("POST", "/v1/devices:bulk", json=body)
    assert status == 200
    assert [r["status"] for r in answer["results"]] == [200, 400, 400, 400, 200, 400, 404, 400, 400]
    many = {"delete": [str(n) for n in range(5001)]}
    assert (await served_api.ask("POST", "/v1/devices:bulk", json=many))[0] == 400


async def test_webhook_is_put_and_delete(served_api: ServedApi) -> None:
    """A connected event makes a device present, a disconnected one absent."""
    event = {"event": "connected", "device": {"id": "gw/1", "address": "10.0.0.1"}}
    assert (await served_api.ask("POST", "/v1/webhook", json=event))[0] == 201
    assert (await served_api.ask("POST", "/v1/webhook", json=event))[0] == 200
    gone = {"event": "disconnected", "device": {"id": "gw/1"}}
    assert (await served_api.ask("POST", "/v1/webhook", json=gone))[0] == 200
    view = served_api.fleet.views.device(slug_of("gw/1"))  # type: ignore[arg-type]
    assert view is not None
    assert view.record.presence is Presence.ABSENT
    bad = {"event": "connected", "device": {"id": "x"}}
    assert (await served_api.ask("POST", "/v1/webhook", json=bad))[0] == 400


def _report(**changed: Any) -> dict[str, Any]:
    from watchdog_agent import wire

    config = {"device_id": "cam", "epoch": 0, "agent_class": "default", "version": "1"}
    said: dict[str, Any] = {
        "instance": "i-1", "sequence": 1, "ready": True, "state": "ok", "was_ready": True,
        "misses": 0, "confirmed": False, "reason": "", "listen": "127.0.0.1:1", "dropped": 0,
    }  # fmt: skip
    return {**wire.report(config, **said), **changed}


async def test_s1_reports_at_the_door(served_api: ServedApi) -> None:
    """The first instance is accepted. A report without a record, or at a future epoch, is answered with "wait". After
    the device has left, the agent is asked to stop."""
    path = "/v1/agents/report"
    assert (await served_api.ask("POST", path, json=_report()))[0] == 409
    await served_api.ask("PUT", "/v1/devices/cam", json=WISH)
    assert (await served_api.ask("POST", path, json=_report()))[0] == 200
    async with served_api.client.post(served_api.base + path, json=_report(epoch=9)) as response:
        assert response.status == 409
        assert int(response.headers["Retry-After"]) > 0
    for wrong in (5, "x" * 33):
        assert (await served_api.ask("POST", path, json=_report(state=wrong)))[0] == 400
    assert (await served_api.ask("POST", path, json=_report(state="of a newer agent")))[0] == 200
    assert (await served_api.ask("GET", "/v1/agents"))[1]["items"][0]["state"] == "suspect"
    for wrong_age in (-1.0, 1e9, "5"):
        assert (await served_api.ask("POST", path, json=_report(state_age_s=wrong_age)))[0] == 400
    assert (await served_api.ask("POST", path, json=_report(newer=1)))[0] == 200
    _, agents = await served_api.ask("GET", "/v1/agents")
    assert [a["id"] for a in agents["items"]] == ["cam"]
    await served_api.ask("DELETE", "/v1/devices/cam")
    assert (await served_api.ask("POST", path, json=_report()))[0] == 410


@pytest.mark.parametrize(
    ("listen", "status"),
    [("", 200), (":8080", 200), ("[::1]:8080", 200), (":x", 400), (":0/path", 400), (":", 400)],
)
async def test_an_agent_may_listen_on_all_addresses(
    served_api: ServedApi, listen: str, status: int
) -> None:
    """An agent that listens on all addresses of its machine reports only a port, and nothing may follow it."""
    await served_api.ask("PUT", "/v1/devices/cam", json=WISH)
    report = _report(listen=listen)
    assert (await served_api.ask("POST", "/v1/agents/report", json=report))[0] == status


async def test_repairs_of_a_report_are_shown_and_told_once(served_api: ServedApi) -> None:
    """The repairs in an agent's report appear in `explain`, and each that ended is one event. Control characters and
    endless texts are made harmless, and another shape is rejected."""
    path = "/v1/agents/report"
    await served_api.ask("PUT", "/v1/devices/cam", json=WISH)

    def told(outcome: str, **more: Any) -> dict[str, Any]:
        attempt = {
            "number": 1,
            "step": "interface \x1beth1",
            "outcome": outcome,
            "reason": "r" * 999,
        }
        return _report(repairs={"active": "", "attempts": [attempt], "newer": 1, **more})

    assert (await served_api.ask("POST", path, json=_report()))[0] == 200
    for outcome in ("running", "no help", "no help"):
        assert (await served_api.ask("POST", path, json=told(outcome)))[0] == 200
    _, explained = await served_api.ask("GET", "/v1/devices/cam/explain")
    (attempt,) = explained["report"]["repairs"]["attempts"]
    assert attempt["step"] == "interface \N{REPLACEMENT CHARACTER}eth1"
    assert len(attempt["reason"]) < 999
    kinds = [event["kind"] for event in explained["events"]]
    assert kinds.count("repair.no_help") == 1
    assert (await served_api.ask("POST", path, json=told("<b>")))[0] == 400
    assert (await served_api.ask("POST", path, json=told("failed", attempts=[{}] * 33)))[0] == 400
    assert (await served_api.ask("POST", path, json=_report(repairs=None)))[0] == 200


async def test_openapi_and_routes_agree(served_api: ServedApi) -> None:
    """Every route is described, every described operation is routed, and every reference resolves."""
    status, spec = await served_api.ask("GET", "/v1/openapi.json")
    assert status == 200
    described = {(m.upper(), path) for path, ops in spec["paths"].items() for m in ops}
    routed = {
        (route.method, route.resource.canonical)
        for route in served_api.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert described == routed
    for ref in set(json.dumps(spec).split('"#/components/schemas/')[1:]):
        assert ref.split('"')[0] in spec["components"]["schemas"]


@pytest.mark.parametrize("secured", [False, True])
def test_the_description_is_valid(secured: bool) -> None:
    """A validator of OpenAPI 3.1 accepts it; operations have unique IDs and a tag that is declared; each one with a
    caller names the refusals that the caller may get."""
    spec = json.loads(json.dumps(openapi.describe(ROUTES, secured=secured)))
    openapi_spec_validator.validate(spec)
    operations = [one for path in spec["paths"].values() for one in path.values()]
    ids = [one["operationId"] for one in operations]
    assert sorted(set(ids)) == sorted(ids)
    declared = {tag["name"] for tag in spec["tags"]}
    assert all(set(one["tags"]) < declared for one in operations)
    for one in operations:
        assert ({"401", "403", "429"} <= one["responses"].keys()) is ("security" in one)


def test_examples_are_accepted() -> None:
    """Each example of a request's body is what the API accepts."""
    bodies = {route.body for route in ROUTES if route.body is not None}
    schemas = {body: body.model_json_schema() for body in bodies}
    examples = [(model, one) for model in bodies for one in schemas[model].get("examples", ())]
    assert {model.__name__ for model, _ in examples} >= {
        "DeviceIn",
        "WebhookIn",
        "PauseIn",
        "MigrateIn",
    }
    for model, one in examples:
        model.model_validate_json(json.dumps(one))


async def test_head_answers_as_get_does_without_a_body(served_api: ServedApi) -> None:
    """HEAD has the status of GET and no body, and never starts an endless stream."""
    for path in ("/", "/healthz", "/v1/devices", "/v1/events?follow=true", "/v1/openapi.json"):
        async with (
            asyncio.timeout(60),
            served_api.client.head(served_api.base + path) as response,
        ):
            assert (response.status, await response.read()) == (200, b""), path
    async with served_api.client.head(served_api.base + "/v1/devices/none") as response:
        assert response.status == 404


async def test_confirming_where_nothing_is_held_is_a_conflict(served_api: ServedApi) -> None:
    """Without held stops a confirmation is answered 409; an invalid ID 400."""
    assert (await served_api.ask("POST", "/v1/plan:confirm", json={"id": "0" * 12}))[0] == 409
    assert (await served_api.ask("POST", "/v1/plan:confirm", json={"id": "all"}))[0] == 400


async def test_events_follow_and_end_with_the_server(served_api: ServedApi) -> None:
    """A follower receives an event created after it connected, and a shutdown ends its stream immediately."""
    async with served_api.client.get(served_api.base + "/v1/events?follow=true") as response:
        await served_api.ask("PUT", "/v1/devices/a", json=WISH)
        async with asyncio.timeout(60):
            while not (line := (await response.content.readline()).strip()):
                pass
        assert json.loads(line)["device"] == "a"
        served_api.runner._shutdown_timeout = 3600.0  # for a stream that would have to be cut off
        async with asyncio.timeout(60):
            await served_api.runner.cleanup()


async def test_events_are_filtered_by_device_kind_verdict_and_age(
    served_api: ServedApi,
) -> None:
    """Each filter selects its events, with and without `follow`; an invalid filter is rejected with an explanation."""
    now = served_api.fleet.clock.wall()
    for device, kind, age_s in (
        ("a", "verdict.offline", 7200),
        ("a", "verdict.watched", 5),
        ("b", "error", 5),
    ):
        served_api.fleet.events.own.add(
            at=WallTime(now - age_s),
            kind=kind,
            device_id=device,
            slug=Slug(device),
            text="t",
            data={},
        )

    async def seqs(query: str) -> list[int]:
        status, body = await served_api.ask("GET", f"/v1/events?{query}")
        assert status == 200, body
        return [item["seq"] for item in body["items"]]

    assert await seqs("device=a") == [1, 2]
    assert await seqs("kind=verdict") == [1, 2]
    assert await seqs("verdict=offline") == [1]
    assert await seqs("within_s=3600") == [2, 3]
    assert await seqs("device=a&within_s=3600&since=1") == [2]
    assert await seqs("device=b&kind=verdict") == []
    status, body = await served_api.ask("GET", "/v1/events?device=nobody")
    assert (status, "'nobody'" in body["error"]["message"]) == (404, True)
    for query in ("verdict=gone", "within_s=0", "within_s=1h", "devices=a"):
        status, body = await served_api.ask("GET", f"/v1/events?{query}")
        assert status == 400
        assert "allowed" in body["error"]["message"]
    async with served_api.client.get(
        served_api.base + "/v1/events?follow=true&device=b"
    ) as response:
        async with asyncio.timeout(60):
            line = await response.content.readline()
        assert (json.loads(line)["id"], json.loads(line)["origin"]) == ("local:3", "local")


async def test_incidents_are_listed_and_shown_on_the_page(served_api: ServedApi) -> None:
    """An open incident is in the list and, escaped, on the page; a closed one is only in the list."""
    correlator = served_api.fleet.recorder.incidents._correlator
    group = ((GroupKind.SITE, "<b>north</b>"),)
    names = [Slug(f"d{n}") for n in range(4)]
    for bad in (False, True):
        for slug in names:
            correlator.observe(slug, group, bad=bad, now=served_api.fleet.clock.monotonic())
    assert (await served_api.ask("GET", "/v1/incidents"))[1] == {"items": []}
    served_api.fleet.verdicts.judge_all()

    _, body = await served_api.ask("GET", "/v1/incidents?open=true")
    (item,) = body["items"]
    assert (item["kind"], item["group"], item["count"], item["open"]) == (
        "site",
        "<b>north</b>",
        4,
        True,
    )
    async with served_api.client.get(served_api.base + "/") as response:
        text = await response.text()
    assert "site <bdi>&lt;b&gt;north&lt;/b&gt;</bdi>" in text
    for slug in names:
        correlator.observe(slug, group, bad=False, now=served_api.fleet.clock.monotonic())
    served_api.fleet.verdicts.judge_all()
    assert (await served_api.ask("GET", "/v1/incidents?open=true"))[1] == {"items": []}
    _, body = await served_api.ask("GET", "/v1/incidents")
    assert [item["open"] for item in body["items"]] == [False]
    assert (await served_api.ask("GET", "/v1/incidents?open=maybe"))[0] == 400


async def test_s9_followers_are_bounded(served_api: ServedApi) -> None:
    """A follower beyond the maximum is asked to retry later; when another leaves there is room again."""
    url = served_api.base + "/v1/events?follow=true"
    open_ones = [await served_api.client.get(url) for _ in range(MAX_FOLLOWERS)]
    assert (await served_api.ask("GET", "/v1/events?follow=true"))[0] == 503
    for response in open_ones:
        response.close()


async def test_the_page_begins_with_what_is_worst(served_api: ServedApi) -> None:
    """An offline device is listed above one whose agent is missing, and that above one that is starting."""
    for name in ("a-new", "b-unwatched", "c-offline"):
        await served_api.ask("PUT", f"/v1/devices/{name}", json=WISH)
    served_api.fleet.attach(
        FixedLoop(obstacle=lambda slug: "no node has room" if slug.startswith("b-") else "")
    )
    served_api.fleet.verdicts.judge_all()
    record = served_api.fleet.records[slug_of(DeviceId("c-offline"))]
    dead = Condition(ConditionState.OFFLINE, WallTime(0.0), "no answer")
    (stored,) = await served_api.fleet.records.commit([replace(record, condition=dead)])
    assert stored is not None
    served_api.fleet.records.learn([stored])
    served_api.fleet.verdicts.judge_all()
    async with served_api.client.get(served_api.base + "/") as response:
        text = await response.text()
    rows = re.findall(r"<tr><td><bdi>(.*?)</bdi></td><td><bdi>(.*?)</bdi>", text)
    assert rows == [
        ("c-offline", "offline"), ("b-unwatched", "unwatched"), ("a-new", "starting")
    ]  # fmt: skip


async def test_a_degraded_device_is_shown_everywhere(served_api: ServedApi) -> None:
    """A device whose service is dead while its host answers is on the page, in the list for its verdict, in the counts
    of the status, and in `explain`."""
    await served_api.ask("PUT", "/v1/devices/web", json=WISH)
    record = served_api.fleet.records[slug_of(DeviceId("web"))]
    ill = Condition(ConditionState.DEGRADED, WallTime(0.0), "http:80: no answer; but icmp answers")
    (stored,) = await served_api.fleet.records.commit([replace(record, condition=ill)])
    assert stored is not None
    served_api.fleet.records.learn([stored])
    served_api.fleet.verdicts.judge_all()
    async with served_api.client.get(served_api.base + "/") as response:
        text = await response.text()
    assert re.findall(r"<tr><td><bdi>(.*?)</bdi></td><td><bdi>(.*?)</bdi>", text) == [
        ("web", "degraded")
    ]
    _, listed = await served_api.ask("GET", "/v1/devices?verdict=degraded")
    assert [(one["id"], one["verdict"]) for one in listed["items"]] == [("web", "degraded")]
    _, status = await served_api.ask("GET", "/v1/status")
    assert status["verdicts"]["degraded"] == 1
    _, explained = await served_api.ask("GET", "/v1/devices/web/explain")
    assert explained["verdict"] == "degraded"


async def test_the_page_is_made_once_for_all_who_ask_meanwhile(
    served_api: ServedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 requests that arrive before the first page is ready, only one renders it."""
    come, all_there, made = 0, asyncio.Event(), 0
    real = page._rendered

    def count(*_: object) -> None:
        nonlocal come
        come += 1
        if come == 20:
            all_there.set()

    async def make(*parts: Any) -> str:
        nonlocal made
        made += 1
        await all_there.wait()
        return await real(*parts)

    monkeypatch.setattr(page, "check_query", count)
    monkeypatch.setattr(page, "_rendered", make)
    monkeypatch.setattr(page, "RENDER_EVERY_S", 3600.0)

    async def ask() -> str:
        async with served_api.client.get(served_api.base + "/") as response:
            return await response.text()

    async with asyncio.timeout(60):
        texts = await asyncio.gather(*(ask() for _ in range(20)))
    assert made == 1
    assert len(set(texts)) == 1


async def test_page_escapes_what_devices_say(served_api: ServedApi) -> None:
    """Markup in an ID reaches the page only as text, and the page allows no scripts."""
    path = "/v1/devices/" + quote("<script>alert(1)</script>", safe="")
    await served_api.ask("PUT", path, json=WISH)
    async with served_api.client.get(served_api.base + "/") as response:
        text = await response.text()
        assert "<script" not in text
        assert "&lt;script&gt;" in text
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")


async def test_small_endpoints(served_api: ServedApi) -> None:
    """Health, readiness, status, plan, artifact and metrics return the expected answers."""
    assert (await served_api.ask("GET", "/healthz"))[0] == 200
    assert (await served_api.ask("GET", "/ready"))[0] == 503
    served_api.fleet.readiness.event.set()
    assert (await served_api.ask("GET", "/ready"))[0] == 200
    for path in ("/v1/status", "/v1/plan"):
        assert (await served_api.ask("GET", path))[0] == 200
    async with served_api.client.get(served_api.base + "/artifacts/watchdog-agent.pyz") as response:
        assert await response.read() == b"PK-agent"
    async with served_api.client.get(served_api.base + "/metrics") as response:
        text = await response.text()
    assert 'api_requests_total{route="/healthz",status="2xx"} 1.0' in text
    assert 'api_requests_total{route="/ready",status="5xx"} 1.0' in text


@pytest.mark.parametrize("token", ["s3cret-token-of-the-api"])
async def test_token_is_asked_for(served_api: ServedApi, token: str) -> None:
    """Without a valid token, all paths except the two health checks answer 401; the token is never disclosed."""
    assert (await served_api.ask("GET", "/healthz"))[0] == 200
    for headers in ({}, {"Authorization": "Bearer nope"}, {"Authorization": f"Basic {token}"}):
        for path in ("/v1/status", "/metrics", "/", "/nothing"):
            status, body = await served_api.ask("GET", path, headers=headers)
            assert status == 401
            assert token not in json.dumps(body)
    good = {"Authorization": f"Bearer {token}"}
    assert (await served_api.ask("GET", "/v1/status", headers=good))[0] == 200


async def test_slow_senders_are_let_go(
    served_api: ServedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that trickles in is answered 408; if headers never end, the connection is closed."""
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.3)
    app = make_app(served_api.fleet, metrics=served_api.metrics, artifact=None)
    runner = Runner(app, keepalive_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    head = b"PUT /v1/devices/x HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    slow = head + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    try:
        for sent, got in ((head, b""), (slow, b"HTTP/1.1 408")):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(sent)
            async with asyncio.timeout(60):
                assert (await reader.read())[:12] == got
            writer.close()
            await writer.wait_closed()
    finally:
        await runner.cleanup()


async def test_our_own_faults_tell_no_details(
    served_api: ServedApi, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected exception is a 500 without its text, logged once, and counted."""

    def broken() -> dict[str, object]:
        raise RuntimeError("canary")

    served_api.fleet.attach(FixedLoop(plan=broken))
    status, body = await served_api.ask("GET", "/v1/plan")
    assert status == 500
    assert "canary" not in json.dumps(body)
    assert [r.message for r in caplog.records if r.name.startswith("nomad_watchdog.api")] == [
        "request failed"
    ]
    assert b'{route="/v1/plan",status="5xx"} 1.0' in served_api.metrics.render()


async def test_errors_of_the_stores_become_statuses(served_api: ServedApi) -> None:
    """A transient error is 503 with Retry-After, a conflict is 409 with Retry-After; both have a message."""
    for error, status in (
        (TransientError("the store is away", retry_after_s=2.5), 503),
        (ConflictError("others were faster"), 409),
    ):

        def failing(error: Exception = error) -> dict[str, object]:
            raise error

        served_api.fleet.attach(FixedLoop(plan=failing))
        async with served_api.client.get(served_api.base + "/v1/plan") as response:
            assert response.status == status
            assert response.headers["Retry-After"] in {"1", "3"}
            assert (await response.json())["error"]["message"] == str(error)


@pytest.mark.parametrize(
    "path", ["/v1/devices", "/v1/agents", "/v1/devices/a", "/v1/devices/a/explain"]
)
async def test_before_the_registry_is_read_nothing_is_called_unknown(
    served_api: ServedApi, path: str
) -> None:
    """A control plane that has just started does not know yet which devices exist, and does not report any as
    unknown."""
    served_api.fleet.records.loaded = False
    async with served_api.client.get(served_api.base + path) as answer:
        assert answer.status == 503
        assert "has not been read yet" in (await answer.json())["error"]["message"]
        assert answer.headers["Retry-After"] == "1"
