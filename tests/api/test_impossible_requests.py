"""W2: impossible requests are rejected on arrival."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from watchdog_agent import wire

from nomad_watchdog.core import presence
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Departure, Device, Epoch, Presence
from tests.api.conftest import ServedApi
from tests.core.world import placement

WISH: dict[str, Any] = {"address": "127.0.0.1"}


@pytest.fixture
def two(served_api: ServedApi) -> ServedApi:
    """The API with the configured classes camera and gateway, and no default class."""
    served_api.fleet.classes = frozenset({"camera", "gateway"})
    return served_api


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"class": "gatway"}, ["class", "'gatway'", "did you mean gateway?", "camera, gateway"]),
        ({"class": "zzz"}, ["'zzz'", "camera, gateway"]),
        ({"class": "default"}, ["unknown agent class 'default'"]),
        ({}, ["no class is given", "'default'", "camera, gateway", "--class"]),
    ],
)
async def test_a_class_that_is_not_configured_is_400(
    two: ServedApi, more: dict[str, str], words: list[str]
) -> None:
    """By PUT, webhook and bulk alike: the error lists the classes, and suggests the one that was meant."""
    webhook = {"event": "connected", "device": WISH | more | {"id": "cam"}}
    asked = (
        await two.ask("PUT", "/v1/devices/cam", json=WISH | more),
        await two.ask("POST", "/v1/webhook", json=webhook),
    )
    messages = [answer["error"]["message"] for status, answer in asked if status == 400]
    bulk = {"devices": [WISH | more | {"id": "cam"}]}
    status, answer = await two.ask("POST", "/v1/devices:bulk", json=bulk)
    (result,) = answer["results"]
    assert (status, result["status"]) == (200, 400)
    messages.append(result["error"])
    assert len(messages) == 3
    for message in messages:
        assert all(word in message for word in words), message
    assert not two.fleet.records


async def test_each_invalid_item_of_a_bulk_request_has_its_index(two: ServedApi) -> None:
    """The valid items are stored; the index refers to `devices` or to `delete`."""
    body = {
        "devices": [
            {"id": "a", "class": "camera", "address": "127.0.0.1"},
            {"id": "b", "class": "camra", "address": "127.0.0.1"},
            "no object",
            {"id": "d", "address": "127.0.0.1"},
        ],
        "delete": ["a b c", "\u0007"],
    }
    _, answer = await two.ask("POST", "/v1/devices:bulk", json=body)
    found = [(r["action"], r["index"], r["status"]) for r in answer["results"]]
    assert found == [
        ("put", 0, 200),
        ("put", 1, 400),
        ("put", 2, 400),
        ("put", 3, 400),
        ("delete", 0, 404),
        ("delete", 1, 400),
    ]
    assert "did you mean camera?" in answer["results"][1]["error"]
    assert [record.device.id for record in two.fleet.records.values()] == ["a"]


@pytest.mark.parametrize(
    ("left", "status"), [(None, 200), (Departure.EXPIRED, 201), (Departure.REMOVED, 400)]
)
async def test_a_device_of_a_class_that_vanished_stays_usable(
    two: ServedApi, left: Departure | None, status: int
) -> None:
    """A device that is registered, or was disconnected briefly, may be registered again with the class that it had. A
    removed device may not, and no device may be moved to such a class."""
    device = Device(DeviceId("cam"), "old", "127.0.0.1")
    await two.fleet.records.register(
        [device, replace(device, id=DeviceId("other"), agent_class="camera")]
    )
    if left is not None:
        await two.fleet.records.deregister([device.id], left)
    answer = await two.ask("PUT", "/v1/devices/cam", json=WISH | {"class": "old"})
    assert answer[0] == status
    present = two.fleet.records[slug_of(device.id)].presence is Presence.PRESENT
    assert present is (left is not Departure.REMOVED)
    moved = await two.ask("PUT", "/v1/devices/other", json=WISH | {"class": "old"})
    assert moved[0] == 400
    assert (await two.ask("POST", "/v1/pauses", json={"class": "old"}))[0] == 201
    assert (await two.ask("DELETE", "/v1/devices/cam"))[0] == 200


async def test_a_pause_of_what_is_not_there_is_refused(two: ServedApi) -> None:
    """Unregistered devices are 404 with a similar ID, an unknown class is 400. A device that another replica has just
    registered is known. A rejected pause is not stored."""
    await two.fleet.records.register([Device(DeviceId("cam-1"), "camera", "127.0.0.1")])
    for body, status, word in (
        ({"devices": ["cam-2"]}, 404, "did you mean 'cam-1'?"),
        ({"devices": ["cam-1", "x", "y"]}, 404, "'x', 'y'"),
        ({"devices": ["cam-2"], "window": True, "for": "1h"}, 404, "cam-2"),
        ({"class": "camra"}, 400, "did you mean camera?"),
    ):
        found, answer = await two.ask("POST", "/v1/pauses", json=body)
        assert (found, word in answer["error"]["message"]) == (status, True), answer
    assert not two.fleet.presence.pauses.all
    two.fleet.records.reset({}, two.fleet.records.index + 1)  # our view is behind the registry
    assert (await two.ask("POST", "/v1/pauses", json={"devices": ["cam-1"]}))[0] == 201


async def test_events_of_a_device_that_was_never_there_are_404(two: ServedApi) -> None:
    """As a page and as a stream; a removed device still has its events."""
    await two.ask("PUT", "/v1/devices/cam-1", json=WISH | {"class": "camera"})
    for query in ("device=cam-2", "device=cam-2&follow=true", "device=cam-2&own=true"):
        status, answer = await two.ask("GET", f"/v1/events?{query}")
        assert (status, "did you mean 'cam-1'?" in answer["error"]["message"]) == (404, True)
    assert (await two.ask("GET", "/v1/events?device=%07"))[0] == 400
    await two.ask("DELETE", "/v1/devices/cam-1")
    two.fleet.records.reset({}, two.fleet.records.index + 1)
    status, page = await two.ask("GET", "/v1/events?device=cam-1")
    assert (status, bool(page["items"])) == (200, True)


async def test_a_device_that_the_registry_has_lost_was_registered_before(
    two: ServedApi,
) -> None:
    """`devices get` and `explain` say so as long as an event about the device is kept, even while its agent still runs
    and its events have the device's ID. For a device that never existed they do not say so."""
    await two.ask("PUT", "/v1/devices/cam-1", json=WISH | {"class": "camera"})
    two.fleet.records.reset({}, two.fleet.records.reached + 1)
    for path in ("/v1/devices/cam-1", "/v1/devices/cam-1/explain"):
        status, answer = await two.ask("GET", path)
        said = answer["error"]["message"]
        assert (status, "it was registered before (event `" in said) == (404, True)
    status, answer = await two.ask("GET", "/v1/devices/zzz/explain")
    assert (status, "before" in answer["error"]["message"]) == (404, False)

    slug = slug_of(DeviceId("cam-1"))
    two.fleet.placements[slug] = (placement("cam-1", 1),)
    status, answer = await two.ask("GET", "/v1/devices/cam-1/explain")
    assert (status, answer["verdict"]) == (200, None)
    start = (
        "the device is not registered, but 1 agent of it runs; it was registered before (event `"
    )
    assert answer["reason"].startswith(start)
    two.fleet.events.note(slug, "plan.retire", "no such device is registered")
    status, page = await two.ask("GET", "/v1/events?device=cam-1&kind=plan.retire")
    assert [event["device"] for event in page["items"]] == ["cam-1"]


async def test_a_device_token_learns_no_ids_from_a_misspelt_one(two: ServedApi) -> None:
    """Only callers who may read every ID get a hint: a heartbeat for an unknown device has none."""
    await two.fleet.records.register([Device(DeviceId("cam-1"), "camera", "127.0.0.1")])
    status, answer = await two.ask("POST", "/v1/devices/cam-2/heartbeat")
    assert (status, "cam-1" in answer["error"]["message"]) == (404, False)
    status, answer = await two.ask("GET", "/v1/devices/cam-2")
    assert (status, "cam-1" in answer["error"]["message"]) == (404, True)


@pytest.mark.parametrize("path", ["/v1/devices", "/v1/agents"])
async def test_a_query_with_two_values_of_a_label_is_400(served_api: ServedApi, path: str) -> None:
    """No device can have both, so an empty list would be misleading; the error names the key."""
    status, answer = await served_api.ask("GET", f"{path}?label=site=a&label=site=b")
    assert status == 400
    assert "'site' is given twice" in answer["error"]["message"]
    assert (await served_api.ask("GET", f"{path}?label=site=a&label=rack=b&label=site=a"))[0] == 200
    assert (await served_api.ask("GET", f"{path}?label=site"))[0] == 400


async def test_the_verdict_departed_lists_devices_that_have_left(
    served_api: ServedApi,
) -> None:
    """Without `presence` only the verdict selects; with `presence` both must match."""
    await served_api.ask("PUT", "/v1/devices/cam", json=WISH)
    await served_api.ask("DELETE", "/v1/devices/cam")
    for query, ids in (
        ("verdict=departed", ["cam"]),
        ("verdict=departed&presence=any", ["cam"]),
        ("verdict=departed&presence=present", []),
        ("verdict=starting", []),
        ("", []),
    ):
        status, answer = await served_api.ask("GET", f"/v1/devices?{query}")
        assert (status, [one["id"] for one in answer["items"]]) == (200, ids), query


async def test_the_last_report_of_a_replaced_agent_is_no_alarm(
    served_api: ServedApi,
) -> None:
    """A report of an older epoch is refused. If the scheduler lists the instance it is recorded as a replacement, and
    if the instance is unknown as a refusal."""
    await served_api.ask("PUT", "/v1/devices/cam", json=WISH)
    record = served_api.fleet.records[slug_of(DeviceId("cam"))]
    (moved,) = await served_api.fleet.records.commit([presence.advance(record, Epoch(2))])
    assert moved is not None
    served_api.fleet.records.learn([moved])
    served_api.fleet.placements[record.slug] = (placement("cam", 1),)
    config = {"device_id": "cam", "epoch": 1, "agent_class": "default", "version": "1"}
    said: dict[str, Any] = {
        "sequence": 1, "ready": True, "state": "ok", "was_ready": True, "misses": 0,
        "confirmed": False, "reason": "", "listen": "127.0.0.1:1", "dropped": 0,
    }  # fmt: skip
    for instance in ("i-cam-1", "i-stranger"):
        body = wire.report(config, instance=instance, **said)
        assert (await served_api.ask("POST", "/v1/agents/report", json=body))[0] == 410
    told = [
        one
        for one in served_api.fleet.events.after(0, 100)[0]
        if one.kind in ("agent.replaced", "refused")
    ]
    assert [one.kind for one in told] == ["agent.replaced", "refused"]
    assert (
        told[0].text == "the agent of epoch 1 was replaced by that of epoch 2 and is told to stop"
    )


@pytest.mark.parametrize(("count", "others"), [(1, 0), (20, 0), (23, 3)])
async def test_an_audit_event_of_a_bulk_request_names_devices(
    served_api: ServedApi, count: int, others: int
) -> None:
    """The first 20 changed devices, and the number of others; an unchanged device is not named."""
    await served_api.ask("PUT", "/v1/devices/same", json=WISH)
    devices = [WISH | {"id": f"d{number:02}"} for number in range(count)]
    body = {"devices": [WISH | {"id": "same"}, *devices], "delete": ["never"]}
    assert (await served_api.ask("POST", "/v1/devices:bulk", json=body))[0] == 200
    (event,) = (await served_api.ask("GET", "/v1/events?kind=audit.bulk"))[1]["items"]
    names = [f"d{number:02}" for number in range(min(count, 20))]
    assert (event["data"]["devices"], event["data"]["others"]) == (names, others)
    assert event["data"]["changed"] == count
    assert event["text"].endswith(", ".join(names) + (f" and {others} more" if others else ""))


async def test_ready_gives_a_reason_only_when_it_is_not(served_api: ServedApi) -> None:
    """The service is ready if agents can report to it; any other problem is only a warning."""
    assert (await served_api.ask("GET", "/ready"))[1]["reason"]
    served_api.fleet.readiness.event.set()
    served_api.fleet.readiness.waits_for = ""
    assert await served_api.ask("GET", "/ready") == (200, {"ready": True, "reason": ""})
    served_api.fleet.readiness.registry_unreadable, served_api.fleet.readiness.registry_problem = (
        True,
        "the registry can't be read",
    )
    status, answer = await served_api.ask("GET", "/ready")
    assert (status, answer) == (
        200, {"ready": True, "reason": "", "warning": "the registry can't be read"},
    )  # fmt: skip


async def test_the_examples_in_the_documentation_are_accepted(
    served_api: ServedApi, repository: Path
) -> None:
    """Each curl command of docs/presence.md uses an existing path and a valid body."""
    text = (repository / "docs/presence.md").read_text()
    examples = re.findall(r"http://127\.0\.0\.1:9670(\S+) \\\n\s+-d '([^']+)'", text)
    assert [path for path, _ in examples] == ["/v1/webhook", "/v1/devices:bulk"]
    for path, body in examples:
        status, answer = await served_api.ask("POST", path, json=json.loads(body))
        assert status in (200, 201), answer
        assert all(one["status"] == 200 for one in answer.get("results", ())), answer
    assert served_api.fleet.records[slug_of(DeviceId("pump-8"))].presence is Presence.PRESENT
