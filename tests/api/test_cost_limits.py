"""Limits on what a caller with a token may cost others: reads, event streams, devices, events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.api import audit
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.events import MAX_FOLLOWERS
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.core import presence
from nomad_watchdog.core.rate_limit import Buckets
from nomad_watchdog.events.device_limits import AT_ONCE, LEFT_OUT
from nomad_watchdog.events.log import MAX_EVENTS
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Device, Epoch, WallTime
from nomad_watchdog.registry.codec import decode, encode
from tests.api.conftest import ServedApi, served
from tests.attacks.table import Attack

FLEET = 10_000
QUOTA = 50
TOKENS = {role: f"{role}-token-0123456789" for role in ("operator", "viewer", "device", "agent")}
HEADERS = {role: {"Authorization": f"Bearer {token}"} for role, token in TOKENS.items()}


def settings(folder: Path, **more: Any) -> ApiSettings:
    """One token per role, as an operator would set them up."""
    tokens = {}
    for role, text in TOKENS.items():
        (folder / role).write_text(text)
        (folder / role).chmod(0o600)
        quota = {"max_devices": QUOTA} if role == "device" else {}
        tokens[role] = {"role": role, "file": str(folder / role)} | quota
    return ApiSettings.model_validate({"token": tokens} | more)


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[ServedApi]:
    """The API with tokens."""
    async with served(tmp_path, authenticator=authenticator_of(settings(tmp_path))) as served_api:
        yield served_api


def fill(served_api: ServedApi, count: int) -> None:
    """Register this many devices, as if the registry had just been read."""
    records = {}
    for number in range(count):
        device = Device(
            DeviceId(f"camera {number:05}"), "default", f"10.0.{number >> 8}.{number & 255}"
        )
        made = presence.register(None, device, WallTime(0.0))
        assert made is not None
        records[made.slug] = replace(made, index=number + 1)
    served_api.fleet.records.reset(records, count)


async def asked(
    served_api: ServedApi, role: str, path: str, method: str = "GET", **more: Any
) -> tuple[int, Any]:
    """Status and body of one request with the token of this role."""
    async with served_api.client.request(
        method, served_api.base + path, headers=HEADERS[role], **more
    ) as answer:
        return answer.status, await answer.json()


@pytest.mark.slow_because("registers 10,000 devices and searches them for some seconds")
@pytest.mark.attack(
    "H11", "a viewer opens 64 event streams and searches 10,000 devices without a pause"
)
async def test_a_viewer_takes_neither_streams_nor_time_from_an_operator(
    tmp_path: Path, attack: Attack
) -> None:
    """A viewer's own streams and searches are refused with 429 and Retry-After. Meanwhile an operator reads, follows
    events and sends heartbeats, and a replica follows."""
    # On a busy machine the searches get little CPU time: a small budget is used up all the same.
    small = settings(tmp_path, read_share=0.01, read_burst="500ms")
    async with AsyncExitStack() as stack:
        guarded = await stack.enter_async_context(
            served(tmp_path, authenticator=authenticator_of(small))
        )
        fill(guarded, FLEET)
        timeout = aiohttp.ClientTimeout(total=150)
        client = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))

        async def follow(role: str, query: str = "") -> int:
            url = f"{guarded.base}/v1/events?follow=true&since={2**40}{query}"
            answer = await stack.enter_async_context(client.get(url, headers=HEADERS[role]))
            return answer.status

        streams = [await follow("viewer") for _ in range(64)]
        assert streams.count(200) == guarded.app_door.streams_per_token
        assert streams.count(429) == 64 - streams.count(200)
        refused: list[float] = []
        answered: list[float] = []
        over = asyncio.Event()

        async def search(number: int) -> None:
            while not over.is_set():
                url = f"{guarded.base}/v1/devices?presence=any&verdict=unwatched&q={number}"
                async with client.get(url, headers=HEADERS["viewer"]) as answer:
                    await answer.read()
                    if answer.status == 429:
                        refused.append(float(answer.headers["Retry-After"]))
                        await asyncio.sleep(
                            0.05
                        )  # no tight loop of refused requests: the client shares this event loop
                    else:
                        assert answer.status == 200
                        answered.append(0.0)

        took: list[float] = []
        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(search(number))
            try:
                async with asyncio.timeout(100):
                    while not refused or len(took) < 20:
                        began = time.perf_counter()
                        status, _ = await asked(guarded, "operator", "/v1/devices/camera%2000007")
                        assert status == 200
                        took.append(time.perf_counter() - began)
                assert await follow("operator") == 200
                assert await follow("operator", "&marks=true") == 200
                status, _ = await asked(
                    guarded, "operator", "/v1/heartbeats", "POST", json={"ids": ["camera 00001"]}
                )
                assert status == 200
            finally:
                over.set()
        assert min(refused) >= 1.0
        attack.tried = 64 + len(refused) + len(answered)
        attack.result = (
            f"{streams.count(429)} streams and {len(refused)} searches refused with 429; operator beside "
            f"them p50 {median(took) * 1e3:.0f} ms, and a stream of its own"
        )


async def test_replicas_have_streams_of_their_own(guarded: ServedApi) -> None:
    """Replicas keep their own streams when operators use all of theirs; a viewer can't pass for a replica."""
    async with AsyncExitStack() as stack:

        async def follow(role: str, query: str = "") -> aiohttp.ClientResponse:
            url = f"{guarded.base}/v1/events?follow=true{query}"
            return await stack.enter_async_context(guarded.client.get(url, headers=HEADERS[role]))

        most = guarded.app_door.streams_per_token
        assert [(await follow("operator")).status for _ in range(most)] == [200] * most
        over = await follow("operator")
        assert (over.status, over.headers["Retry-After"]) == (429, "30")
        assert f"already has {most} event streams" in await over.text()
        assert (await follow("operator", "&marks=true")).status == 200
        assert (await follow("viewer", "&marks=true")).status == 403
        assert most < MAX_FOLLOWERS


async def test_a_read_costs_what_it_takes(tmp_path: Path) -> None:
    """A token with a small budget is refused after more expensive reads, whatever they read. Another token, and a
    request that reads nothing, are not refused."""
    tiny = settings(tmp_path, read_share=0.001, read_burst="1ms")
    async with served(tmp_path, authenticator=authenticator_of(tiny)) as served_api:
        fill(served_api, 2_000)
        for path in (
            "/v1/devices?limit=1000",
            "/v1/devices/camera%2000001/explain",
            "/v1/events",
            "/",
        ):
            async with asyncio.timeout(30):
                while (
                    answer := await served_api.client.get(
                        served_api.base + path, headers=HEADERS["viewer"]
                    )
                ).status != 429:
                    assert answer.status == 200
            assert int(answer.headers["Retry-After"]) >= 1
            assert "or for less at a time" in (await answer.json())["error"]["message"]
        status, _ = await asked(served_api, "operator", "/v1/devices/camera%2000001")
        assert status == 200
        status, _ = await asked(served_api, "device", "/v1/heartbeats", "POST", json={"ids": []})
        assert status == 200


async def test_a_scrape_is_neither_charged_nor_refused(tmp_path: Path) -> None:
    """`/metrics` is free of charge, and is answered even if the token's budget is used up."""
    tiny = settings(tmp_path, read_share=0.001, read_burst="1ms")
    async with served(tmp_path, authenticator=authenticator_of(tiny)) as served_api:
        fill(served_api, 1_000)
        costs = served_api.app_door.costs
        assert costs is not None

        async def scrape(role: str) -> int:
            url = served_api.base + "/metrics"
            async with served_api.client.get(url, headers=HEADERS[role]) as answer:
                return answer.status

        for role in ("viewer", "operator"):
            async with asyncio.timeout(30):
                while (await asked(served_api, role, "/v1/devices?limit=1000"))[0] != 429:
                    pass
            before = costs.spent_s
            assert [await scrape(role) for _ in range(5)] == [200] * 5
            assert costs.spent_s == before


@pytest.mark.slow_because("sends some hundred requests one after another")
@pytest.mark.attack("H8", "register and remove device after device with a device token")
async def test_a_device_token_registers_no_more_than_its_quota(
    guarded: ServedApi, attack: Attack
) -> None:
    """Removed devices count until their records are deleted. An operator can still register devices. When the
    tombstones are gone the token may register again, at higher epochs."""
    answers = []
    for number in range(4 * QUOTA):
        path = f"/v1/devices/x{number}"
        body = {"address": "127.0.0.1"}
        status, answer = await asked(guarded, "device", path, "PUT", json=body)
        answers.append(status)
        if status == 403:
            assert answer["error"]["code"] == "device_quota"
            assert "max_devices" in answer["error"]["message"]
            continue
        assert (await asked(guarded, "device", path, "DELETE"))[0] == 200
    assert answers == [201] * QUOTA + [403] * (3 * QUOTA)
    status, answer = await asked(
        guarded,
        "device",
        "/v1/devices:bulk",
        "POST",
        json={"devices": [{"id": one, "address": "127.0.0.1"} for one in ("x1", "y1")]},
    )
    assert [one["status"] for one in answer["results"]] == [200, 403]
    operator = await asked(
        guarded, "operator", "/v1/devices/op", "PUT", json={"address": "127.0.0.1"}
    )
    assert operator[0] == 201
    fleet = guarded.fleet
    left = [one for one in fleet.records.values() if one.presence.value == "absent"]
    moved = await fleet.records.commit([presence.advance(one, Epoch(9)) for one in left])
    old = [one for one in moved if one is not None]
    fleet.records.learn(old)
    assert await fleet.records.forget(old) == len(left)
    assert fleet.records.keys() == {slug_of(DeviceId(one)) for one in ("x1", "op")}
    assert (await fleet.registry.read()).records.keys() == fleet.records.keys()
    assert (await fleet.records.read_floor()).epoch == 9
    status, _ = await asked(
        guarded, "device", "/v1/devices/z", "PUT", json={"address": "127.0.0.1"}
    )
    assert status == 201
    record = fleet.records[slug_of(DeviceId("z"))]
    assert decode(encode(record)).source == "token:device"
    attack.tried = len(answers)
    attack.result = f"{answers.count(403)} refused with 403 at a quota of {QUOTA}; the operator's device registered"


@pytest.mark.slow_because("sends as many repair attempts as would fill every ring of events")
@pytest.mark.attack(
    "H5", "an agent's reports with 32 new repair attempts each, to push out the audit"
)
async def test_a_flood_of_repairs_displaces_no_audit_event(
    guarded: ServedApi, attack: Attack
) -> None:
    """The attempts of one device are stored up to its limit; the rest is counted and reported once. Audit events and
    events of other devices stay, and an operator's change is audited during the flood."""
    body = {"address": "127.0.0.1"}
    await asked(guarded, "operator", "/v1/devices/first", "PUT", json=body)
    await asked(guarded, "operator", "/v1/devices/pump", "PUT", json=body)
    fleet = guarded.fleet
    slug = slug_of(DeviceId("pump"))
    stored = await fleet.records.commit([presence.advance(fleet.records[slug], Epoch(1))])
    fleet.records.learn([one for one in stored if one is not None])
    reports = MAX_EVENTS // 32 + 20
    took = []
    for sequence in range(reports):
        attempts = [
            {"number": 32 * sequence + n + 1, "step": "s", "outcome": "failed", "reason": "r" * 200}
            for n in range(32)
        ]
        report = {
            "v": 1, "device_id": "pump", "epoch": 1, "instance": "i", "sequence": sequence, "ready": True,
            "state": "ok", "was_ready": True, "misses": 0, "confirmed": False,
            "repairs": {"attempts": attempts},
        }  # fmt: skip
        assert (await asked(guarded, "agent", "/v1/agents/report", "POST", json=report))[0] == 200
        if sequence % 50 == 0:
            began = time.perf_counter()
            path = f"/v1/devices/op{sequence}"
            assert (await asked(guarded, "operator", path, "PUT", json=body))[0] == 201
            took.append(time.perf_counter() - began)
    _, answer = await asked(guarded, "operator", "/v1/events?kind=audit.&limit=1000")
    devices = [one["device"] for one in answer["items"]]
    assert devices[:2] == ["first", "pump"]
    assert len(devices) == 2 + len(took)
    kinds = [one.kind for one in fleet.events.own.recent() if one.slug == slug]
    assert kinds.count("repair.failed") <= AT_ONCE
    assert fleet.events.limits.total >= 32 * (reports - 2) - AT_ONCE
    fleet.events.limits._buckets.spend(slug, -1000.0, fleet.clock.monotonic())
    fleet.recorder.tick()
    (left_out,) = [one for one in fleet.events.own.recent() if one.kind == LEFT_OUT]
    assert left_out.data["count"] == fleet.events.limits.total
    attack.tried = 32 * reports
    attack.result = (
        f"{kinds.count('repair.failed')} attempts stored, {fleet.events.limits.total} counted; all "
        f"{len(devices)} audit events there; operator p50 {median(took) * 1e3:.0f} ms"
    )


async def test_changes_beyond_the_rate_of_a_token_are_counted_and_stated(
    guarded: ServedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that exceeds its rate of changes gets no event for the rest, and one event that states how many. Changes
    with another token are audited meanwhile."""
    monkeypatch.setattr(audit, "REPORT_EVERY_S", 1.0)
    context = guarded.app[CONTEXT]
    context.audits.buckets = Buckets(0.001, 2)
    body = {"address": "127.0.0.1"}
    for number in range(5):
        await asked(guarded, "device", f"/v1/devices/d{number}", "PUT", json=body)
    await asked(guarded, "operator", "/v1/devices/op", "PUT", json=body)
    history, seen = guarded.fleet.events.own, 0
    async with asyncio.timeout(30):
        while not any(one.kind == "audit.left_out" for one in history.recent()):
            await history.wait(seen, 5.0)
            seen = history.last_seq
    audited = [one for one in history.recent() if one.kind.startswith("audit.")]
    assert [one.data["actor"] for one in audited].count("token:device") == 3
    assert [one.device_id for one in audited if one.data["actor"] == "token:operator"] == ["op"]
    (stated,) = [one for one in audited if one.kind == "audit.left_out"]
    assert stated.text.startswith("3 changes by token:device have no event")
    metric = "nomad_watchdog_events_left_out_total"
    assert context.metrics.registry.get_sample_value(metric, {"sender": "token"}) == 3
