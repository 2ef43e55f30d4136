"""Device addresses are validated on input, and addresses stored before there was a rule do no
harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.cli.main import _code
from nomad_watchdog.controllers.inventory_file import read, signature
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import AgentSpec, Device, Epoch, VerdictState
from nomad_watchdog.schedulers import agent_document
from nomad_watchdog.testing.conformance import record_of
from tests.api.conftest import ServedApi, served_api, token
from tests.e2e.test_reconciler import control_plane
from tests.schedulers.conftest import directory, eventually

__all__ = ["directory", "served_api", "token"]

GOOD = [
    ("gerät.local", "xn--gert-noa.local"),
    ("[::1]", "::1"),
    ("::ffff:10.0.0.9", "10.0.0.9"),
    ("[FE80::1%eth0]", "fe80::1%eth0"),
]
BAD = [
    ("127.10.1.999", "write four numbers from 0 to 255"),
    ("http://10.0.0.9", "write 10.0.0.9"),
    ("10.0.0.9:8080", "write 10.0.0.9"),
    ("10.0.0.0/24", "write the address of one device"),
    ("fe80::1", "write the network interface of the agent's host with it, as fe80::1%eth0"),
    ("[::1]:80", "has a port; write ::1"),
    ("a..b", "is not a host name"),
    ("-x", "is not a host name"),
    ("☃.net", "write its ASCII form"),
]


async def stored(served_api: ServedApi, name: str = "x") -> str | None:
    status, answer = await served_api.ask("GET", f"/v1/devices/{name}")
    return answer["address"] if status == 200 else None


@pytest.mark.parametrize(("text", "wanted"), GOOD)
async def test_addresses_are_stored_in_one_form(
    served_api: ServedApi, text: str, wanted: str
) -> None:
    """PUT, bulk and webhook store the form that agents use; the same address again changes
    nothing."""
    item: dict[str, Any] = {"id": "x", "address": text}
    assert (await served_api.ask("PUT", "/v1/devices/x", json={"address": text}))[0] == 201
    assert await stored(served_api) == wanted
    for form in (text, wanted):
        _, answer = await served_api.ask("PUT", "/v1/devices/x", json={"address": form})
        assert answer["changed"] is False
        _, answer = await served_api.ask("POST", "/v1/devices:bulk", json={"devices": [item]})
        assert [one["changed"] for one in answer["results"]] == [False]
        event = {"event": "connected", "device": item | {"address": form}}
        _, answer = await served_api.ask("POST", "/v1/webhook", json=event)
        assert answer["changed"] is False


@pytest.mark.parametrize(("text", "words"), BAD)
async def test_what_is_no_address_is_refused_at_the_api(
    served_api: ServedApi, text: str, words: str
) -> None:
    """PUT and webhook answer 400 with the expected form; in bulk only that item is rejected."""
    status, answer = await served_api.ask("PUT", "/v1/devices/x", json={"address": text})
    assert (status, words in answer["error"]["message"]) == (400, True), answer
    event = {"event": "connected", "device": {"id": "x", "address": text}}
    status, answer = await served_api.ask("POST", "/v1/webhook", json=event)
    assert (status, words in answer["error"]["message"]) == (400, True), answer
    items = [{"id": "x", "address": text}, {"id": "y", "address": "10.0.0.1"}]
    status, answer = await served_api.ask("POST", "/v1/devices:bulk", json={"devices": items})
    assert [one["status"] for one in answer["results"]] == [400, 200]
    assert words in answer["results"][0]["error"]
    assert (await stored(served_api), await stored(served_api, "y")) == (None, "10.0.0.1")


async def test_a_device_can_leave_whatever_its_address(served_api: ServedApi) -> None:
    """A gateway that repeats a wrong address when a device disconnects is accepted."""
    await served_api.ask("PUT", "/v1/devices/x", json={"address": "10.0.0.1"})
    gone = {"event": "disconnected", "device": {"id": "x", "address": "10.0.0.9:8080"}}
    assert (await served_api.ask("POST", "/v1/webhook", json=gone))[0] == 200


@pytest.mark.parametrize("suffix", ["hcl", "json"])
def test_inventory_files_follow_the_same_rule(tmp_path: Path, suffix: str) -> None:
    """Valid addresses are stored in normal form; an invalid one is reported with its line and the
    expected form."""
    path = tmp_path / f"fleet.{suffix}"

    def load(texts: list[str]) -> list[str]:
        lines = [json.dumps({"id": f"d{n}", "address": text}) for n, text in enumerate(texts)]
        if suffix == "hcl":
            lines = [f'device "d{n}" {{ address = "{text}" }}' for n, text in enumerate(texts)]
        path.write_text("\n".join(lines))
        return [one.address for one in read(path, signature(path)).values()]

    assert load([one for one, _ in GOOD]) == [one for _, one in GOOD]
    for text, words in BAD:
        with pytest.raises(UserError) as caught:
            load(["10.0.0.1", text])
        assert "line 2: address: " in str(caught.value)
        assert words in str(caught.value)


@pytest.mark.parametrize(("text", "words"), BAD)
def test_the_command_line_sends_no_bad_address(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`devices add` and `devices import` exit 64 with the expected form, without calling the
    API."""
    assert _code(["devices", "add", "x", f"--address={text}"]) == 64
    assert words in capsys.readouterr().err
    file = tmp_path / "fleet.ndjson"
    file.write_text(json.dumps({"id": "x", "address": text}) + "\n")
    assert _code(["devices", "import", str(file)]) == 64
    said = capsys.readouterr().err
    assert "line 1" in said
    assert words in said


async def test_an_address_that_was_stored_before_the_rule(tmp_path: Path, directory: Path) -> None:
    """A device with an invalid address in the registry is unwatched with that reason and gets no
    agent. One with brackets gets its agent, and so does a device whose address is fixed."""
    async with control_plane(tmp_path, directory) as plane:
        bad, brackets = DeviceId("bad"), DeviceId("brackets")
        await plane.fleet.records.register(
            [Device(bad, "default", "10.0.0.0/24"), Device(brackets, "default", "[::1]")]
        )

        def judged() -> bool:
            found = plane.fleet.views.device(slug_of(bad))
            return found is not None and (
                found.verdict.state is VerdictState.UNWATCHED
                and "'10.0.0.0/24' is a network" in found.verdict.reason
            )

        await eventually(judged)
        await eventually(lambda: len(plane.pids("brackets")) == 1)
        assert plane.pids("bad") == set()
        await plane.fleet.records.register([Device(bad, "default", "10.0.0.1")])
        await eventually(lambda: len(plane.pids("bad")) == 1)


def test_the_document_has_the_form_that_agents_take() -> None:
    """If a record has another form of an address, the document has the agent's form; without a
    valid address there is no document."""
    record = record_of("pump")
    for text, wanted in GOOD:
        told = agent_document.document(_at(record, text), Epoch(1), {})
        assert told["address"] == wanted
    for text, words in BAD:
        with pytest.raises(UserError, match=r"^address: ") as caught:
            agent_document.document(_at(record, text), Epoch(1), {})
        assert words in str(caught.value)


def _at(record: Any, text: str) -> Any:
    from dataclasses import replace

    return replace(record, device=replace(record.device, address=text))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probes": []}, "probes is empty"),
        ({"probes": [{"kind": "tcp", "port": 1, "interval_s": 172800.0}]}, "interval_s is 172800"),
        ({"gateway": {"address": "10.0.0.0/24"}}, "gateway: address: '10.0.0.0/24' is a network"),
    ],
)
def test_a_class_whose_agents_would_reject_it(change: dict[str, Any], words: str) -> None:
    """Settings that agents of a class would reject are found when the class is read, without the
    files of their hosts."""
    probe = {"kind": "https", "port": 443, "ca_cert": "/nowhere", "client_cert": "/nowhere"}
    good = {"v": 1, "probes": [probe], "consul": "https://x", "consul_tls": {"ca_cert": "/nowhere"}}
    agent_document.check_class(AgentSpec("camera", "1", "h", agent_config=good))
    with pytest.raises(UserError, match="class camera: its agents would reject") as caught:
        agent_document.check_class(AgentSpec("camera", "1", "h", agent_config=good | change))
    assert words in str(caught.value)
