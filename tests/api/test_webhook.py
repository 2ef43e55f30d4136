"""Signed webhooks over real HTTP: who may send one, and the effect of a replay."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.api.auth import Authenticator as Gate
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.core.webhook_signature import SignatureHeaders, sign
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import DeviceRecord, Presence, WallTime
from tests.api.conftest import ServedApi, served

SECRETS = [b"s" * 32, b"t" * 32]
CONNECTED = {"event": "connected", "device": {"id": "gw/1", "address": "10.0.0.1"}}
GONE = {"event": "disconnected", "device": {"id": "gw/1"}}


class Wall(SystemClock):
    """A clock whose wall time the test sets."""

    at = 1_800_000_000.0

    def wall(self) -> WallTime:
        return WallTime(self.at)


def gate(folder: Path) -> Gate:
    (folder / "token").write_text("operators-s3cret-token")
    lines = ["whsec_" + base64.b64encode(secret).decode() for secret in SECRETS]
    (folder / "secrets").write_text("\n".join(lines))
    return authenticator_of(
        ApiSettings(token_file=str(folder / "token"), webhook_secrets_file=str(folder / "secrets"))
    )


@pytest.fixture
async def served_api(tmp_path: Path) -> AsyncIterator[ServedApi]:
    async with served(tmp_path, authenticator=gate(tmp_path)) as it:
        it.fleet.clock = it.fleet.records.clock = Wall()
        yield it


async def send(
    served_api: ServedApi,
    body: object,
    *,
    message: str = "msg_1",
    later: int = 0,
    secret: bytes = SECRETS[0],
    **changes: str,
) -> tuple[int, Any]:
    """Send a signed call. `later`: seconds after the clock's start; `changes`: of the headers."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    signed = SignatureHeaders(message, int(Wall.at) + later)
    headers = {
        "Content-Type": "application/json",
        "webhook-id": signed.id,
        "webhook-timestamp": str(signed.at),
        "webhook-signature": sign(secret, signed, data),
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    headers = {name: value for name, value in headers.items() if value}
    return await served_api.ask("POST", "/v1/webhook", data=data, headers=headers)


def presence(served_api: ServedApi) -> Presence | None:
    record = served_api.fleet.records.get(slug_of(DeviceId("gw/1")))
    return None if record is None else record.presence


async def loaded(served_api: ServedApi) -> tuple[dict[Slug, DeviceRecord], int]:
    """What is loaded at start: the record of the device."""
    record = await served_api.fleet.registry.get(slug_of(DeviceId("gw/1")))
    assert record is not None
    return {record.slug: record}, record.index


async def test_a_signed_event_needs_no_token(served_api: ServedApi) -> None:
    """An event signed with either secret is applied and audited as signed."""
    assert (await send(served_api, CONNECTED))[0] == 201
    assert (await send(served_api, GONE, message="msg_2", secret=SECRETS[1], later=1))[0] == 200
    assert presence(served_api) is Presence.ABSENT
    kinds = [(e.kind, e.data.get("role")) for e in served_api.fleet.events.own.after(0, 99)[0]]
    assert kinds.count(("audit.webhook", "signed")) == 2


async def test_what_is_not_signed_well_is_401_and_does_nothing(
    served_api: ServedApi,
) -> None:
    """Without a signature, with a wrong, old or future one, or with one of another body: 401, and the answer and the
    metric say so."""
    cases: list[dict[str, Any]] = [
        {"webhook_signature": ""},
        {"webhook_id": ""},
        {"webhook_timestamp": ""},
        {"webhook_id": "msg_2"},
        {"webhook_timestamp": str(int(Wall.at) + 1)},
        {"webhook_timestamp": "1e9"},
        {"webhook_signature": "v1,AAAA"},
        {"webhook_signature": "v1"},
        {"webhook_signature": "v1,é"},
        {"webhook_signature": " ".join(["v1,AAAA"] * 400)},
        {"secret": b"u" * 32},
        {"later": -301},
        {"later": 301},
    ]
    for case in cases:
        status, body = await send(served_api, CONNECTED, **case)
        assert status == 401, case
        assert body["error"]["code"] == "unauthorized"
    assert presence(served_api) is None
    text = served_api.metrics.render().decode()
    assert f'api_refusals_total{{reason="unauthorized"}} {len(cases)}.0' in text


async def test_the_signature_is_checked_before_the_body_is_read(
    served_api: ServedApi,
) -> None:
    """A body that is not JSON is 401 unsigned and 400 signed; the signature covers the bytes as sent, including
    blanks."""
    assert (await send(served_api, b"{", webhook_signature="v1,AAAA"))[0] == 401
    assert (await send(served_api, b"{"))[0] == 400
    spaced = json.dumps(CONNECTED, indent=7).encode() + b" \n"
    assert (await send(served_api, spaced))[0] == 201


async def test_a_token_may_stand_for_the_signature(served_api: ServedApi) -> None:
    """An unsigned call with an operator's token is applied; a signature that is sent as well must be valid."""
    token = {"Authorization": "Bearer operators-s3cret-token"}
    asked = await served_api.ask("POST", "/v1/webhook", json=CONNECTED, headers=token)
    assert asked[0] == 201
    assert (await send(served_api, GONE, Authorization="Bearer operators-s3cret-token"))[0] == 409
    wrong = {"Authorization": "Bearer operators-s3cret-token", "webhook_signature": "v1,AAAA"}
    assert (await send(served_api, GONE, **wrong))[0] == 401
    assert (await send(served_api, GONE, Authorization="Bearer nope"))[0] == 401


async def test_s5_a_replay_has_no_effect(served_api: ServedApi) -> None:
    """A repeated call is answered with `duplicate` and changes nothing, even after the device has gone; the same ID
    with another body is 409."""
    status, first = await send(served_api, CONNECTED)
    assert (status, first["duplicate"]) == (201, False)
    assert (await send(served_api, GONE, message="msg_2", later=1))[0] == 200
    status, again = await send(served_api, CONNECTED)
    assert (status, again["duplicate"], again["changed"]) == (200, True, False)
    assert presence(served_api) is Presence.ABSENT
    status, body = await send(served_api, GONE)
    assert status == 409
    assert "another body" in body["error"]["message"]


async def test_a_failed_event_may_be_sent_again(served_api: ServedApi) -> None:
    """An event that was rejected for its content does not use up its ID: the corrected one may have the same."""
    assert (await send(served_api, {"event": "connected", "device": {"id": "gw/1"}}))[0] == 400
    assert (await send(served_api, CONNECTED))[0] == 201
    assert (await send(served_api, {"event": "disconnected", "device": {"id": "x"}}, message="m"))[
        0
    ] == 404


async def test_s5_a_replay_has_no_effect_after_a_restart(
    tmp_path: Path, served_api: ServedApi
) -> None:
    """After a restart without any memory, an older event is refused with 409 and the last one is recognised as a
    duplicate; a later one is applied."""
    await send(served_api, CONNECTED)
    await send(served_api, GONE, message="msg_2", later=5)
    async with served(tmp_path, authenticator=gate(tmp_path)) as other:
        other.fleet.clock = other.fleet.records.clock = Wall()
        other.fleet.records.reset(*await loaded(other))
        status, body = await send(other, CONNECTED)
        assert status == 409
        assert "5 s before" in body["error"]["message"]
        status, again = await send(other, GONE, message="msg_2", later=5)
        assert (status, again["changed"], again["duplicate"]) == (200, False, True)
        assert presence(other) is Presence.ABSENT
        assert (await send(other, CONNECTED, message="msg_3", later=6))[0] == 201


async def test_w1_a_late_event_changes_nothing(tmp_path: Path, served_api: ServedApi) -> None:
    """Connected at -10, connected at -2 (changes nothing), disconnected at -3: the device stays, also on a replica that
    has just started, where the event that changed nothing is recognised as a duplicate."""
    assert (await send(served_api, CONNECTED, message="a", later=-10))[0] == 201
    status, second = await send(served_api, CONNECTED, message="b", later=-2)
    assert (status, second["changed"], second["duplicate"]) == (200, False, False)
    async with served(tmp_path, authenticator=gate(tmp_path)) as other:
        other.fleet.clock = other.fleet.records.clock = Wall()
        other.fleet.records.reset(*await loaded(other))
        for replica in (served_api, other):
            status, body = await send(replica, GONE, message="c", later=-3)
            assert status == 409
            assert "1 s before" in body["error"]["message"]
            assert presence(replica) is Presence.PRESENT
        _, again = await send(other, CONNECTED, message="b", later=-2)
        assert (again["changed"], again["duplicate"]) == (False, True)
        generation = other.fleet.records[slug_of(DeviceId("gw/1"))].generation
        assert generation == 1


async def test_w1_two_events_of_one_second_leave_the_device_watched(
    served_api: ServedApi,
) -> None:
    """A disconnect signed in the same second as a connect is refused with the reason; a connect signed in the same
    second as a disconnect brings the device back."""
    assert (await send(served_api, CONNECTED, message="a"))[0] == 201
    status, body = await send(served_api, GONE, message="b")
    assert status == 409
    assert "the device stays watched" in body["error"]["message"]
    assert (await send(served_api, GONE, message="c", later=5))[0] == 200
    assert (await send(served_api, CONNECTED, message="d", later=5))[0] == 201
    assert presence(served_api) is Presence.PRESENT


async def test_w1_a_request_that_confirms_the_device_makes_older_events_late(
    served_api: ServedApi,
) -> None:
    """After a PUT that changed nothing, an event signed before it is refused."""
    assert (await send(served_api, CONNECTED, message="a", later=-10))[0] == 201
    token = {"Authorization": "Bearer operators-s3cret-token"}
    wish = {"address": "10.0.0.1"}
    status, same = await served_api.ask("PUT", "/v1/devices/gw%2F1", json=wish, headers=token)
    assert (status, same["changed"]) == (200, False)
    assert (await send(served_api, GONE, message="b", later=-3))[0] == 409
    assert presence(served_api) is Presence.PRESENT


async def test_the_window_is_bounded_and_the_record_still_guards(
    served_api: ServedApi,
) -> None:
    """With a window of two IDs, a replay of a forgotten event is refused because of its device's record."""
    served_api.app_door.window.most = 2
    await send(served_api, CONNECTED)
    await send(served_api, GONE, message="msg_2", later=1)
    for number in range(3):
        other = {"event": "connected", "device": {"id": f"n{number}", "address": "a"}}
        assert (await send(served_api, other, message=f"other_{number}"))[0] == 201
    assert (await send(served_api, CONNECTED))[0] == 409
    assert len(served_api.app_door.window) <= 2


async def test_where_secrets_are_asked_for_an_open_api_asks_too(tmp_path: Path) -> None:
    """Without any configured token, an unsigned webhook is 401, and other routes stay open."""
    secret = "whsec_" + base64.b64encode(SECRETS[0]).decode()
    (tmp_path / "secrets").write_text(secret)
    api = ApiSettings(webhook_secrets_file=str(tmp_path / "secrets"))
    async with served(tmp_path, authenticator=authenticator_of(api)) as served_api:
        served_api.fleet.clock = served_api.fleet.records.clock = Wall()
        assert (await served_api.ask("POST", "/v1/webhook", json=CONNECTED))[0] == 401
        none = {"Authorization": "Bearer anything"}
        assert (await served_api.ask("POST", "/v1/webhook", json=CONNECTED, headers=none))[0] == 401
        assert (await send(served_api, CONNECTED))[0] == 201
        assert (await served_api.ask("GET", "/v1/status"))[0] == 200
