"""Leases, heartbeats, ownership and pauses through the API."""

from __future__ import annotations

from typing import Any

import pytest

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Departure, Device, Limits, PresenceRules
from tests.api.conftest import ServedApi

WISH: dict[str, Any] = {"address": "127.0.0.1"}


async def leave(served_api: ServedApi, name: str, left: Departure) -> None:
    await served_api.fleet.records.deregister([DeviceId(name)], left)


async def test_a_ttl_is_stored_shown_and_changed(served_api: ServedApi) -> None:
    """A request with another TTL changes the device, and the returned TTL can be sent again."""
    path = "/v1/devices/cam"
    before = served_api.fleet.clock.wall()
    assert (await served_api.ask("PUT", path, json=WISH | {"ttl": "90s"}))[0] == 201
    _, item = await served_api.ask("GET", path)
    assert item["ttl"] == "90s"
    passed_s = served_api.fleet.clock.wall() - before
    assert 90 - passed_s - 1 <= item["expires_in_s"] <= 90
    assert not (await served_api.ask("PUT", path, json=WISH | {"ttl": item["ttl"]}))[1]["changed"]
    assert (await served_api.ask("PUT", path, json=WISH | {"ttl": "1500ms"}))[1]["changed"]
    assert (await served_api.ask("GET", path))[1]["ttl"] == "1500ms"
    assert (await served_api.ask("PUT", path, json=WISH))[1]["changed"]
    _, item = await served_api.ask("GET", path)
    assert (item["ttl"], item["expires_in_s"]) == (None, None)


@pytest.mark.parametrize("ttl", ["", "90", "-1s", "10ms", "1y", 90, "9" * 40 + "s"])
async def test_a_ttl_without_sense_is_refused(served_api: ServedApi, ttl: object) -> None:
    """The error names the field."""
    status, answer = await served_api.ask("PUT", "/v1/devices/cam", json=WISH | {"ttl": ttl})

    assert status == 400
    assert "ttl" in answer["error"]["message"]


async def test_a_heartbeat_brings_back_only_who_expired(served_api: ServedApi) -> None:
    """The desired state of an expired device is restored; a device that was removed is 404."""
    path = "/v1/devices/cam"
    for left, status in (
        (Departure.EXPIRED, 204),
        (Departure.DISCONNECTED, 404),
        (Departure.REMOVED, 404),
    ):
        await served_api.ask("PUT", path, json=WISH | {"ttl": "60s", "labels": {"site": "a"}})
        await leave(served_api, "cam", left)
        _, item = await served_api.ask("GET", path)
        assert (item["presence"], item["left"]) == ("absent", left.value)
        assert (await served_api.ask("POST", path + "/heartbeat"))[0] == status
    await served_api.ask("PUT", path, json=WISH | {"ttl": "60s", "labels": {"site": "a"}})
    await leave(served_api, "cam", Departure.EXPIRED)
    _, answer = await served_api.ask("POST", "/v1/heartbeats", json={"ids": ["cam"]})
    assert answer == {"heard": 1, "unknown": []}
    _, item = await served_api.ask("GET", path)
    assert (item["presence"], item["labels"], item["ttl"]) == ("present", {"site": "a"}, "60s")


async def test_a_gateway_beats_for_many_and_hears_who_is_unknown(
    served_api: ServedApi,
) -> None:
    """Unknown, duplicate and hostile IDs do not affect the others; a heartbeat writes nothing to the registry."""
    names = [f"d{n}" for n in range(500)]
    items = [{"id": name} | WISH | {"ttl": "60s"} for name in names]
    await served_api.ask("POST", "/v1/devices:bulk", json={"devices": items})
    before = (await served_api.fleet.registry.read()).index
    strangers = ["never", "", "\x00", "../x"]
    status, answer = await served_api.ask(
        "POST", "/v1/heartbeats", json={"ids": [*names, *strangers, names[0]]}
    )

    assert status == 200
    assert answer == {"heard": 501, "unknown": strangers}
    assert (await served_api.fleet.registry.read()).index == before


async def test_nobody_is_unknown_before_the_registry_was_read(served_api: ServedApi) -> None:
    """503 with a retry delay, not a 404 that a gateway would believe."""
    served_api.fleet.records.loaded = False
    for path, body in (("/v1/devices/cam/heartbeat", None), ("/v1/heartbeats", {"ids": ["cam"]})):
        assert (await served_api.ask("POST", path, json=body))[0] == 503
    assert (await served_api.ask("PUT", "/v1/devices/cam", json=WISH))[0] == 201


async def test_a_heartbeat_is_not_refused_by_an_old_cache(served_api: ServedApi) -> None:
    """A device that another replica has just registered is found in the registry."""
    other = Fleet(served_api.fleet.registry, Limits(), SystemClock())
    await other.records.register([Device(DeviceId("cam"), "default", "127.0.0.1")])
    assert slug_of(DeviceId("cam")) not in served_api.fleet.records
    assert (await served_api.ask("POST", "/v1/devices/cam/heartbeat"))[0] == 204


@pytest.mark.parametrize(
    "body", [{}, {"ids": "d1"}, {"ids": [1]}, {"ids": ["d"] * 10_001}, {"ids": ["d" * 129]}]
)
async def test_heartbeats_without_sense_are_refused(served_api: ServedApi, body: Any) -> None:
    """An invalid or oversized list is rejected as a whole."""
    assert (await served_api.ask("POST", "/v1/heartbeats", json=body))[0] == 400


async def test_a_disconnect_may_be_a_blink_and_a_removal_is_not(
    served_api: ServedApi,
) -> None:
    """The webhook and `now=false` leave the agent its grace period; DELETE ends the grace period, even later on."""
    path, slug = "/v1/devices/cam", slug_of(DeviceId("cam"))
    served_api.fleet.presence.heartbeats.rules = PresenceRules(grace_s=60.0)
    event = {"event": "connected", "device": {"id": "cam", "ttl": "5m"} | WISH}
    assert (await served_api.ask("POST", "/v1/webhook", json=event))[0] == 201
    gone = {"event": "disconnected", "device": {"id": "cam"}}
    assert (await served_api.ask("POST", "/v1/webhook", json=gone))[0] == 200
    assert served_api.fleet.presence.is_resting(slug)
    assert (await served_api.ask("DELETE", path))[1]["changed"]
    assert not served_api.fleet.presence.is_resting(slug)
    await served_api.ask("POST", "/v1/webhook", json=event)
    assert (await served_api.ask("DELETE", path + "?now=false"))[1]["changed"]
    assert served_api.fleet.presence.is_resting(slug)
    assert (await served_api.ask("DELETE", path + "?now=maybe"))[0] == 400
    assert (await served_api.ask("DELETE", path + "?later=true"))[0] == 400


async def test_flapping_is_said(served_api: ServedApi) -> None:
    """Six simultaneous changes create an event and set a field; the latest request is the desired state."""
    event = {"event": "connected", "device": {"id": "cam"} | WISH}
    gone = {"event": "disconnected", "device": {"id": "cam"}}
    for _ in range(4):
        await served_api.ask("POST", "/v1/webhook", json=event)
        await served_api.ask("POST", "/v1/webhook", json=gone)
    _, item = await served_api.ask("GET", "/v1/devices/cam")
    assert (item["flapping"], item["presence"]) == (True, "absent")
    kinds = [e["kind"] for e in (await served_api.ask("GET", "/v1/events"))[1]["items"]]
    assert kinds.count("flapping") == 1
    assert (await served_api.ask("GET", "/v1/status"))[1]["flapping"] == 1
    _, told = await served_api.ask("GET", "/v1/devices/cam/explain")
    assert told["attendance"]["flapping"] is True
    assert told["attendance"]["agent_kept"] == "", "it has no agent that could be kept"


async def test_what_an_inventory_lists_is_changed_there(served_api: ServedApi) -> None:
    """While the file is configured, any differing request is answered 409, and an equal one is no conflict. Without the
    file the API may change the device."""
    source = "inventory:/etc/devices.json"
    await served_api.fleet.records.register(
        [Device(DeviceId("cam"), "default", "127.0.0.1")], source
    )
    served_api.fleet.presence.inventories = frozenset({source})
    path = "/v1/devices/cam"
    assert (await served_api.ask("PUT", path, json=WISH))[0] == 200
    status, answer = await served_api.ask("PUT", path, json={"address": "::1"})
    assert (status, source in answer["error"]["message"]) == (409, True)
    assert (await served_api.ask("DELETE", path))[0] == 409
    body = {"devices": [{"id": "cam", "address": "::1"}, {"id": "b", "address": "::1"}]}
    _, done = await served_api.ask("POST", "/v1/devices:bulk", json=body)
    assert [r["status"] for r in done["results"]] == [409, 200]
    _, done = await served_api.ask("POST", "/v1/devices:bulk", json={"delete": ["cam", "b"]})
    assert [r["status"] for r in done["results"]] == [409, 200]
    _, item = await served_api.ask("GET", path)
    assert (item["address"], item["source"]) == ("127.0.0.1", source)

    served_api.fleet.presence.inventories = frozenset()
    assert (await served_api.ask("PUT", path, json={"address": "::1"}))[0] == 200
    assert (await served_api.ask("GET", path))[1]["source"] == ""


async def test_a_pause_is_made_shown_moved_and_ended(served_api: ServedApi) -> None:
    """The same target keeps its ID; the device and `explain` name the pause; `resume` ends it."""
    await served_api.ask("PUT", "/v1/devices/cam", json=WISH)
    body = {"devices": ["cam"], "for": "1h", "reason": "new lens", "by": "eve"}
    status, made = await served_api.ask("POST", "/v1/pauses", json=body)
    assert (status, made["covers"], made["active"]) == (201, 1, True)
    assert made["ends"] - made["begins"] == pytest.approx(3600, abs=1)
    assert (await served_api.ask("GET", "/v1/devices/cam"))[1]["paused"] == made["id"]
    _, told = await served_api.ask("GET", "/v1/devices/cam/explain")
    assert told["attendance"]["paused"]["by"] == "anonymous (eve)"
    assert told["attendance"]["paused"]["reason"] == "new lens"
    _, moved = await served_api.ask("POST", "/v1/pauses", json=body | {"for": "2h"})
    assert moved["id"] == made["id"]
    assert moved["ends"] > made["ends"]
    assert len((await served_api.ask("GET", "/v1/pauses"))[1]["items"]) == 1

    status, answer = await served_api.ask("POST", "/v1/pauses:resume", json={"class": "default"})
    assert (status, made["id"] in answer["error"]["message"]) == (404, True)
    assert (await served_api.ask("POST", "/v1/pauses:resume", json={"devices": ["cam"]}))[0] == 200
    assert (await served_api.ask("GET", "/v1/devices/cam"))[1]["paused"] is None


async def test_a_window_begins_later_and_is_removed_by_its_id(served_api: ServedApi) -> None:
    """Nothing is paused before it begins; its ID removes it once."""
    await served_api.ask("PUT", "/v1/devices/cam", json=WISH | {"labels": {"site": "a"}})
    body = {"labels": {"site": "a"}, "window": True, "for": "1h"}
    _, later = await served_api.ask(
        "POST", "/v1/pauses", json=body | {"from": "2026-12-24T20:00:00Z"}
    )
    assert (later["active"], later["covers"]) == (False, 1)
    assert (await served_api.ask("GET", "/v1/devices/cam"))[1]["paused"] is None
    _, now = await served_api.ask("POST", "/v1/pauses", json=body)
    assert (await served_api.ask("GET", "/v1/devices/cam"))[1]["paused"] == now["id"]
    assert (await served_api.ask("POST", "/v1/pauses:resume", json={"labels": {"site": "a"}}))[
        0
    ] == 404
    assert (await served_api.ask("DELETE", f"/v1/pauses/{now['id']}"))[0] == 200
    assert (await served_api.ask("DELETE", f"/v1/pauses/{now['id']}"))[0] == 404
    assert (await served_api.ask("GET", "/v1/status"))[1]["paused"] == 0


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"labels": {}},
        {"devices": ["cam"], "for": "0s"},
        {"devices": ["cam"], "for": "1h", "until": "2026-12-24T20:00:00Z"},
        {"devices": ["cam"], "until": "2001-01-01T00:00:00Z"},
        {"devices": ["cam"], "until": "2026-12-24T20:00:00"},
        {"devices": ["cam"], "until": "9999-12-24T20:00:00Z"},
        {"devices": ["cam"], "window": True},
        {"devices": ["cam"], "reason": "\x1b[2J"},
        {"devices": [f"d{n}" for n in range(201)]},
    ],
)
async def test_pauses_without_sense_are_refused(served_api: ServedApi, body: Any) -> None:
    """An empty target, two ends, or an end that is past, too far away or without a time zone."""
    assert (await served_api.ask("POST", "/v1/pauses", json=body))[0] == 400


async def test_pauses_are_bounded(served_api: ServedApi) -> None:
    """The 257th pause is refused, and the others stay."""
    for n in range(256):
        status, _ = await served_api.ask("POST", "/v1/pauses", json={"labels": {"n": str(n)}})
        assert status == 201
    status, answer = await served_api.ask("POST", "/v1/pauses", json={"labels": {"n": "one more"}})

    assert (status, "at most 256" in answer["error"]["message"]) == (400, True)
    assert len(served_api.fleet.presence.pauses.all) == 256
