"""Authentication over real HTTP: roles, credentials, changed files, rate limits, audit."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.api.app import ROUTES
from nomad_watchdog.api.auth import Authenticator, authenticator_of
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.api import ApiSettings, TokenSettings
from nomad_watchdog.core.agent_token import TokenClaim, issue
from nomad_watchdog.core.rate_limit import Buckets
from nomad_watchdog.core.roles import Right, Role
from nomad_watchdog.errors import UserError
from nomad_watchdog.fleet.records import RecordCache
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.logs import clean
from nomad_watchdog.model import Device, Epoch, Monotonic
from tests.api.conftest import served
from tests.api.test_api import WISH, _report

KEY = "k" * 40
SECRETS = {role: f"{role}-token-{'x' * 20}" for role in Role}


class Later(SystemClock):
    """A clock whose monotonic time the test moves forward."""

    ahead = 0.0

    def monotonic(self) -> Monotonic:
        return Monotonic(super().monotonic() + self.ahead)


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def credential(name: str, epoch: int, key: str = KEY) -> str:
    return issue(key.encode(), TokenClaim(slug_of(DeviceId(name)), Epoch(epoch)))


def settings(folder: Path, **changes: Any) -> ApiSettings:
    """Settings of an API with one token per role; their files are in the folder."""
    tokens = {}
    for role in Role:
        (folder / role).write_text(SECRETS[role] + "\n")
        prefix = "gw-" if role is Role.DEVICE else ""
        tokens[str(role)] = TokenSettings(
            role=role.value, file=str(folder / role), id_prefix=prefix
        )
    (folder / "keys").write_text(f"{KEY}\n")
    values = {"token": tokens, "agent_key_file": str(folder / "keys"), **changes}
    return ApiSettings(**values)


@pytest.fixture
def secured(tmp_path: Path) -> Authenticator:
    served_api = authenticator_of(settings(tmp_path))
    served_api.clock = Later()
    return served_api


def paths() -> Iterator[tuple[str, str, Right]]:
    for route in ROUTES:
        if not route.public:
            yield route.method, route.path.replace("{id}", "gw-none"), route.right


async def test_each_role_gets_what_the_table_says_and_no_more(
    tmp_path: Path, secured: Authenticator
) -> None:
    """On every route that is not public: 401 without a token or with an unknown one; 403 with a role that lacks the
    right, naming one that has it; neither with a role that has it."""
    async with served(tmp_path, authenticator=secured) as served_api:
        for method, path, right in paths():
            for headers in ({}, bearer("nope"), {"Authorization": "Basic abc"}):
                status, body = await served_api.ask(method, path, headers=headers)
                assert status == 401, (method, path)
            for role in Role:
                url, headers = served_api.base + path, bearer(SECRETS[role])
                async with served_api.client.request(method, url, headers=headers) as response:
                    may = (
                        right
                        in {
                            Role.VIEWER: {Right.READ},
                            Role.DEVICE: {Right.CHANGE},
                            Role.AGENT: {Right.REPORT},
                            Role.OPERATOR: set(Right),
                        }[role]
                    )
                    assert (response.status not in {401, 403}) == may, (method, path, role)
                    if not may:
                        body = await response.json()
                        assert "operator" in body["error"]["message"]
                        assert f"yours is {role}" in body["error"]["message"]


def test_what_changes_something_is_for_operators_unless_it_says_otherwise() -> None:
    """Only these routes change something and are open to other roles than operator; no public route of the table
    changes anything."""
    open_to_more = {
        (route.method, route.path): route.right
        for route in ROUTES
        if route.method != "GET" and route.right is not Right.OPERATE
    }
    assert open_to_more == {
        ("PUT", "/v1/devices/{id}"): Right.CHANGE,
        ("DELETE", "/v1/devices/{id}"): Right.CHANGE,
        ("POST", "/v1/devices:bulk"): Right.CHANGE,
        ("POST", "/v1/devices/{id}/heartbeat"): Right.CHANGE,
        ("POST", "/v1/heartbeats"): Right.CHANGE,
        ("POST", "/v1/webhook"): Right.CHANGE,
        ("POST", "/v1/agents/report"): Right.REPORT,
    }
    assert {route.method for route in ROUTES if route.public} == {"GET"}


async def test_openapi_tells_the_roles(tmp_path: Path, secured: Authenticator) -> None:
    """The description of each operation lists the roles that may use it; public ones have none."""
    async with served(tmp_path, authenticator=secured) as served_api:
        url = "/v1/openapi.json"
        _, spec = await served_api.ask("GET", url, headers=bearer(SECRETS[Role.VIEWER]))
    assert spec["paths"]["/v1/devices"]["get"]["x-roles"] == ["viewer", "operator"]
    assert spec["paths"]["/v1/webhook"]["post"]["x-roles"] == ["device", "operator"]
    assert spec["paths"]["/v1/agents/report"]["post"]["x-roles"] == ["agent", "operator"]
    assert spec["paths"]["/v1/plan:confirm"]["post"]["x-roles"] == ["operator"]
    assert "x-roles" not in spec["paths"]["/healthz"]["get"]


async def test_a_prefix_limits_a_device_token(tmp_path: Path, secured: Authenticator) -> None:
    """A token with a prefix changes only devices with that prefix, singly, in bulk and by webhook."""
    headers = bearer(SECRETS[Role.DEVICE])
    async with served(tmp_path, authenticator=secured) as served_api:
        for name, status in (("gw-1", 201), ("other", 403)):
            path = f"/v1/devices/{name}"
            assert (await served_api.ask("PUT", path, json=WISH, headers=headers))[0] == status
            beat = await served_api.ask("POST", f"{path}/heartbeat", headers=headers)
            assert beat[0] == (204 if status == 201 else 403)
            gone = {"event": "disconnected", "device": {"id": name}}
            told = await served_api.ask("POST", "/v1/webhook", json=gone, headers=headers)
            assert told[0] == (200 if status == 201 else 403)
        body = {"devices": [{"id": "gw-2", **WISH}, {"id": "x", **WISH}], "delete": ["y"]}
        _, answer = await served_api.ask("POST", "/v1/devices:bulk", json=body, headers=headers)
        assert [r["status"] for r in answer["results"]] == [200, 403, 403]
        assert served_api.fleet.views.device(slug_of(DeviceId("x"))) is None


def labelled(folder: Path) -> Authenticator:
    """An API with an operator token, and a device token for site n only."""
    (folder / "north").write_text("north-token-" + "n" * 20)
    (folder / "all").write_text("all-token-" + "a" * 20)
    north = TokenSettings(role="device", file=str(folder / "north"), labels={"site": "n"})
    return authenticator_of(
        ApiSettings(
            token={"north": north, "all": TokenSettings(role="operator", file=str(folder / "all"))}
        )
    )


async def test_labels_limit_a_device_token(tmp_path: Path) -> None:
    """By every route, a token for one site changes only devices of that site. It cannot take over a device of another
    site by setting its own label, give one of its own away, or bring back one that has left."""
    north, every = bearer("north-token-" + "n" * 20), bearer("all-token-" + "a" * 20)
    mine, other = {**WISH, "labels": {"site": "n"}}, {**WISH, "labels": {"site": "s"}}
    async with served(tmp_path, authenticator=labelled(tmp_path)) as served_api:

        async def ask(method: str, path: str, body: Any = None, who: Any = north) -> int:
            return (await served_api.ask(method, path, json=body, headers=who))[0]

        assert await ask("PUT", "/v1/devices/a", mine) == 201
        assert await ask("PUT", "/v1/devices/a", other) == 403
        assert await ask("PUT", "/v1/devices/b", WISH) == 403
        for name in ("b", "c"):
            assert await ask("PUT", f"/v1/devices/{name}", other, every) == 201
        assert await ask("DELETE", "/v1/devices/c", who=every) == 200
        for name, status in (("a", 204), ("b", 403)):
            assert await ask("POST", f"/v1/devices/{name}/heartbeat") == status
        assert await ask("POST", "/v1/heartbeats", {"ids": ["a", "b"]}) == 403
        for name in ("b", "c"):
            assert await ask("PUT", f"/v1/devices/{name}", mine) == 403
            assert await ask("DELETE", f"/v1/devices/{name}") == 403
            said = {"event": "connected", "device": {"id": name, **mine}}
            assert await ask("POST", "/v1/webhook", said) == 403
            said = {"event": "disconnected", "device": {"id": name}}
            assert await ask("POST", "/v1/webhook", said) == 403
        body = {
            "devices": [{"id": name, **wish} for name, wish in (("d", mine), ("b", mine))],
            "delete": ["c", "a"],
        }
        _, answer = await served_api.ask("POST", "/v1/devices:bulk", json=body, headers=north)
        assert [one["status"] for one in answer["results"]] == [200, 403, 403, 200]


async def test_labels_are_asked_of_what_is_stored_now(tmp_path: Path) -> None:
    """If another replica registered the device for site s, a replica that has not read that yet lets a token of site n
    neither change nor remove it: the labels are checked again when the compare-and-set is lost."""
    mine = {**WISH, "labels": {"site": "n"}}
    async with served(tmp_path, authenticator=labelled(tmp_path)) as served_api:
        north = bearer("north-token-" + "n" * 20)
        device_id = DeviceId("a")
        wish = Device(device_id, "default", WISH["address"], {"site": "s"})
        other = RecordCache(served_api.fleet.registry, SystemClock())
        await other.register([wish])
        assert served_api.fleet.records.get(slug_of(device_id)) is None
        assert (await served_api.ask("PUT", "/v1/devices/a", json=mine, headers=north))[0] == 403
        stored = await other.registry.get(slug_of(device_id))
        assert stored is not None
        assert stored.device == wish
        bulk = {"devices": [{"id": "a", **mine}]}
        assert (await served_api.ask("POST", "/v1/devices:bulk", json=bulk, headers=north))[
            0
        ] == 403


async def test_a_changed_file_counts_and_a_missing_one_revokes(
    tmp_path: Path, secured: Authenticator
) -> None:
    """One second after its file changed, the old token is 401 and the new one valid. Without its file it is 401 too;
    other tokens still work."""
    clock = secured.clock
    assert isinstance(clock, Later)
    async with served(tmp_path, authenticator=secured) as served_api:

        async def status(secret: str) -> int:
            clock.ahead += 2
            return (await served_api.ask("GET", "/v1/status", headers=bearer(secret)))[0]

        assert await status(SECRETS[Role.VIEWER]) == 200
        (tmp_path / "viewer").write_text("a-new-token-for-the-viewer")
        assert await status(SECRETS[Role.VIEWER]) == 401
        assert await status("a-new-token-for-the-viewer") == 200
        (tmp_path / "viewer").unlink()
        assert await status("a-new-token-for-the-viewer") == 401
        assert await status("") == 401
        assert await status(SECRETS[Role.OPERATOR]) == 200


async def test_s1_a_credential_reports_for_its_device_and_epoch_only(
    tmp_path: Path, secured: Authenticator
) -> None:
    """A credential is valid for its own agent's report. For another device or epoch it is 403, a forged one is 401, and
    no other route accepts it. S1 still applies: a device that has left is 410, one without a record 409."""
    path = "/v1/agents/report"
    operator = bearer(SECRETS[Role.OPERATOR])
    async with served(tmp_path, authenticator=secured) as served_api:
        for name in ("cam", "other"):
            await served_api.ask("PUT", f"/v1/devices/{name}", json=WISH, headers=operator)
        good = bearer(credential("cam", 0))

        async def told(headers: dict[str, str], **changed: Any) -> int:
            return (await served_api.ask("POST", path, json=_report(**changed), headers=headers))[0]

        assert await told(good) == 200
        assert await told(good, device_id="other") == 403
        assert await told(good, epoch=1) == 403
        assert await told(bearer(credential("cam", 1))) == 403
        assert await told(bearer(credential("cam", 0, "f" * 40))) == 401
        assert await told(bearer(credential("never", 0)), device_id="never") == 409
        await served_api.ask("DELETE", "/v1/devices/other", headers=operator)
        assert await told(bearer(credential("other", 0)), device_id="other") == 410
        assert await told(bearer(SECRETS[Role.AGENT])) == 200
        assert await told(bearer(SECRETS[Role.VIEWER])) == 403
        for method, other, _ in paths():
            if other != path:
                assert (await served_api.ask(method, other, headers=good))[0] == 403, other


async def test_credentials_outlive_a_change_of_key(tmp_path: Path, secured: Authenticator) -> None:
    """After a new first key was added, credentials made with the old key are valid as long as its line is in the
    file."""
    assert isinstance(secured.clock, Later)
    operator = bearer(SECRETS[Role.OPERATOR])
    old, new = bearer(credential("cam", 0)), bearer(credential("cam", 0, "n" * 40))
    async with served(tmp_path, authenticator=secured) as served_api:
        await served_api.ask("PUT", "/v1/devices/cam", json=WISH, headers=operator)
        for lines, status_old, status_new in (
            (KEY, 200, 401),
            (f"{'n' * 40}\n{KEY}", 200, 200),
            ("n" * 40, 401, 200),
        ):
            (tmp_path / "keys").write_text(lines)
            secured.clock.ahead += 2
            for headers, status in ((old, status_old), (new, status_new)):
                asked = await served_api.ask(
                    "POST", "/v1/agents/report", json=_report(), headers=headers
                )
                assert asked[0] == status, lines


async def test_an_open_api_still_checks_credentials(tmp_path: Path) -> None:
    """Without tokens, on the local machine, a credential that is sent must still be valid and match."""
    api = ApiSettings(agent_key_file=str(tmp_path / "keys"))
    (tmp_path / "keys").write_text(KEY)
    async with served(tmp_path, authenticator=authenticator_of(api)) as served_api:
        await served_api.ask("PUT", "/v1/devices/cam", json=WISH)
        for headers, status in (
            (bearer(credential("cam", 0)), 200),
            (bearer(credential("cam", 0, "f" * 40)), 401),
            (bearer(credential("dog", 0)), 403),
        ):
            asked = await served_api.ask(
                "POST", "/v1/agents/report", json=_report(), headers=headers
            )
            assert asked[0] == status


async def test_s9_each_client_has_its_own_share(tmp_path: Path, secured: Authenticator) -> None:
    """A token beyond its burst is 429 with Retry-After, while another token, an agent's credential and the health check
    are answered; after that delay it is answered again."""
    assert isinstance(secured.clock, Later)
    secured.buckets = Buckets(0.5, 3)
    viewer, operator = bearer(SECRETS[Role.VIEWER]), bearer(SECRETS[Role.OPERATOR])
    async with served(tmp_path, authenticator=secured) as served_api:
        asked = [await served_api.ask("GET", "/v1/status", headers=viewer) for _ in range(4)]
        assert [status for status, _ in asked] == [200, 200, 200, 429]
        async with served_api.client.get(
            served_api.base + "/v1/status", headers=viewer
        ) as response:
            wait = int(response.headers["Retry-After"])
        assert 1 <= wait <= 2
        assert (await served_api.ask("GET", "/v1/status", headers=operator))[0] == 200
        for name in ("a", "b", "c", "d", "e"):
            headers = bearer(credential(name, 0))
            report = _report(device_id=name)
            asked = [
                await served_api.ask("POST", "/v1/agents/report", json=report, headers=headers)
            ]
            assert asked[0][0] == 409
        assert [(await served_api.ask("GET", "/healthz"))[0] for _ in range(9)] == [200] * 9
        guesses = [
            (await served_api.ask("GET", "/v1/status", headers=bearer("guess")))[0] for _ in "1234"
        ]
        assert guesses == [401, 401, 401, 429]
        secured.clock.ahead += wait
        assert (await served_api.ask("GET", "/v1/status", headers=viewer))[0] == 200
        text = served_api.metrics.render().decode()
        assert 'api_refusals_total{reason="limited"} 3.0' in text
        assert 'api_refusals_total{reason="unauthorized"} 3.0' in text


async def test_each_change_is_audited_once_with_who_and_what(
    tmp_path: Path, secured: Authenticator, caplog: pytest.LogCaptureFixture
) -> None:
    """Register, deregister, webhook and bulk requests create an event and a log line with actor, role, peer, device and
    outcome. A repeat that changes nothing creates none. Neither contains a token (S10)."""
    caplog.set_level(logging.INFO)
    headers, gateway = bearer(SECRETS[Role.OPERATOR]), bearer(SECRETS[Role.DEVICE])
    async with served(tmp_path, authenticator=secured) as served_api:
        for _ in range(2):
            await served_api.ask("PUT", "/v1/devices/gw-1", json=WISH, headers=headers)
        other = {**WISH, "address": "127.0.0.2"}
        await served_api.ask("PUT", "/v1/devices/gw-1", json=other, headers=gateway)
        gone = {"event": "disconnected", "device": {"id": "gw-1"}}
        for _ in range(2):
            await served_api.ask("POST", "/v1/webhook", json=gone, headers=gateway)
        bulk = {"devices": [{"id": "a", **WISH}, {"id": "b", **WISH}], "delete": ["gw-1"]}
        await served_api.ask("POST", "/v1/devices:bulk", json=bulk, headers=headers)
        await served_api.ask("DELETE", "/v1/devices/a", headers=headers)
        _, page = await served_api.ask("GET", "/v1/events", headers=headers)
    audits = [item for item in page["items"] if item["kind"].startswith("audit.")]
    assert [(a["kind"], a["device"], a["data"]["actor"], a["data"]["outcome"]) for a in audits] == [
        ("audit.register", "gw-1", "token:operator", "created"),
        ("audit.register", "gw-1", "token:device", "changed"),
        ("audit.webhook", "gw-1", "token:device", "removed"),
        ("audit.bulk", "", "token:operator", "changed"),
        ("audit.deregister", "a", "token:operator", "removed"),
    ]
    # the delete too: a disconnected device has a grace period, a deregistered one has none
    assert audits[3]["data"]["changed"] == 3
    assert {a["data"]["peer"] for a in audits} == {"127.0.0.1"}
    lines = [r for r in caplog.records if r.message == "changed through the API"]
    assert len(lines) == len(audits)
    written = [clean(vars(line)["actor"]) for line in lines]
    assert written == [a["data"]["actor"].replace(":", " ") for a in audits]
    said = json.dumps(page) + "".join(str(vars(record)) for record in caplog.records)
    assert not any(secret in said for secret in SECRETS.values())


async def test_refusals_are_logged_as_one_line(
    tmp_path: Path, secured: Authenticator, caplog: pytest.LogCaptureFixture
) -> None:
    """Fifty rejected requests are counted, and make one log line in ten seconds. The next line states how many it
    stands for. Neither contains what was sent."""
    assert isinstance(secured.clock, Later)
    async with served(tmp_path, authenticator=secured) as served_api:
        for _ in range(50):
            await served_api.ask("GET", "/v1/status", headers=bearer("guessed-secret"))
        secured.clock.ahead += 11
        headers = bearer(SECRETS[Role.VIEWER])
        assert (await served_api.ask("DELETE", "/v1/devices/x", headers=headers))[0] == 403
        text = served_api.metrics.render().decode()
    assert 'api_refusals_total{reason="unauthorized"} 50.0' in text
    assert 'api_refusals_total{reason="forbidden"} 1.0' in text
    lines = [vars(record) for record in caplog.records if record.message == "request refused"]
    told = [(line["status"], line["actor"], line["others_before"]) for line in lines]
    assert told == [(401, "", 0), (403, "token:viewer", 49)]
    assert "guessed-secret" not in str(lines)


HOSTILE = [
    "Bearer",
    "Bearer ",
    "Bearer  \t ",
    "bearer " + "x" * 8000,
    "Bearer wda1....",
    "Bearer wda1." + "9" * 500,
    "Bearer wda1.a-b.99999999999999999999999.x",
    "Bearer wda1.a-b.٣.x",
    "Bearer \udcff\udcfe",
    "Basic Og==",
    "Bearer a b c",
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda text: ascii(text)[:30])
async def test_hostile_authorization_headers_are_401(
    tmp_path: Path, secured: Authenticator, value: str
) -> None:
    """Any invalid header is answered 401 in our format, and is not repeated in the answer."""
    async with served(tmp_path, authenticator=secured) as served_api:
        status, body = await served_api.ask("GET", "/v1/status", headers={"Authorization": value})
    assert status == 401
    assert set(body["error"]) == {"code", "message"}
    assert "wda1" not in body["error"]["message"]


async def test_two_authorization_headers_do_not_add_up(
    tmp_path: Path, secured: Authenticator
) -> None:
    """A second header has no effect: the first one is used."""
    headers = [("Authorization", "Bearer nope"), *bearer(SECRETS[Role.OPERATOR]).items()]
    async with (
        served(tmp_path, authenticator=secured) as served_api,
        served_api.client.get(served_api.base + "/v1/status", headers=headers) as response,
    ):
        assert response.status in {400, 401}


@pytest.mark.parametrize(
    ("setting", "content", "words"),
    [
        ("token_file", None, "No such file"),
        ("token_file", b" \n", "is empty"),
        ("token_file", b"\xff", "is not text"),
        ("token_file", b"x" * 70_000, "larger than"),
        ("agent_key_file", b"too short", "line 1 has 9 characters"),
        ("agent_key_file", f"{KEY}\nshort".encode(), "line 2 has 5 characters"),
        ("webhook_secrets_file", b"hunter2-hunter2", "begins with whsec_"),
    ],
)
def test_a_file_without_a_good_secret_is_refused_at_start(
    tmp_path: Path, setting: str, content: bytes | None, words: str
) -> None:
    """The message names the setting and what is wrong, and contains nothing of the file (S10)."""
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"api.{setting} .*{re.escape(words)}") as caught:
        authenticator_of(ApiSettings(**{setting: str(file)}))
    assert "hunter2" not in str(caught.value)
    assert "too short'" not in str(caught.value)


def test_two_names_for_one_token_are_refused(tmp_path: Path) -> None:
    """Two files with the same token are rejected, because its owner would be ambiguous."""
    api = settings(tmp_path)
    (tmp_path / "viewer").write_text(SECRETS[Role.OPERATOR])
    with pytest.raises(UserError, match="the same token"):
        authenticator_of(api)
