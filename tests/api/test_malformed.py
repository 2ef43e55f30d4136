"""Malformed HTTP requests that contain a token, on raw sockets: no byte of the token is written anywhere."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog import logs
from nomad_watchdog.api import malformed
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.config.api import ApiSettings
from tests.api.conftest import ServedApi, served
from tests.attacks.table import Attack
from tests.fixed_loop import FixedLoop

KNOWN, UNKNOWN = secrets.token_hex(20), secrets.token_hex(20)
PIECES = (KNOWN, UNKNOWN, KNOWN[:24], UNKNOWN[:24])
"""Must not be found: the tokens, and parts long enough to help guess the rest."""
SHAPES = (
    "GET /v1/status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\r\n\r\n",
    "GET /v1/status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\0\r\n\r\n",
    "GET /v1/status HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {}\r\n\r\n",
    "GET /v1/status HTTP/9.9x\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n",
)


@contextmanager
def logged(style: logs.Format = "json") -> Iterator[StringIO]:
    """All log records at every level, as `run` writes them; complete at the end."""
    out = StringIO()
    stop = logs.setup("debug", style, out)
    try:
        yield out
    finally:
        stop()


@contextmanager
def no_quarrel_with_pytest() -> Iterator[None]:
    """Re-enable loggers that another test has silenced."""
    logger = logging.getLogger("aiohttp.server")
    before = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(before)


def guarded(folder: Path) -> object:
    """A server that knows one of the tokens."""
    (folder / "known").write_text(KNOWN)
    return served(
        folder, authenticator=authenticator_of(ApiSettings(token_file=str(folder / "known")))
    )


def asked(port: int, packets: list[bytes]) -> bytes:
    """The server's answer to these packets, until it closes the connection or has sent nothing for a while."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for packet in packets:
                connection.sendall(packet)
            connection.settimeout(0.3)
            while piece := connection.recv(65536):
                got += piece
        except OSError:  # the server closed first, or waits for the rest of the body
            pass
    return got


@pytest.mark.attack("H3", "malformed requests that carry a token, of four shapes, on raw sockets")
async def test_h3_no_malformed_request_gets_into_the_log(tmp_path: Path, attack: Attack) -> None:
    """None of 540 requests leaves a byte of its token in a log, answer, event or explanation; all are counted, and
    reported in one or two lines."""
    requests = [
        shape.format(token).encode()
        for _ in range(34)
        for token in (KNOWN, UNKNOWN, KNOWN + UNKNOWN, "x" + UNKNOWN)
        for shape in SHAPES
    ][:540]
    with no_quarrel_with_pytest(), logged() as out:
        async with guarded(tmp_path) as served_api:  # type: ignore[attr-defined]
            port = served_api.runner.addresses[0][1]
            answers = await asyncio.to_thread(
                lambda: [asked(port, [request]) for request in requests]
            )
            said = await everything(served_api)
    lines = [line for line in out.getvalue().splitlines() if "malformed requests" in line]
    answered = [answer for answer in answers if answer]  # a reset may arrive before the answer
    assert answered
    assert all(b" 400 " in answer[:20] for answer in answered)
    for text in (out.getvalue(), said, *(answer.decode("latin-1") for answer in answers)):
        assert not any(piece in text for piece in PIECES)
    assert len(lines) <= 3  # the first immediately, one per minute, the rest at the end
    assert sum(json.loads(line)["requests"] for line in lines) == len(requests)
    assert f"nomad_watchdog_api_malformed_total {float(len(requests))}" in said
    attack.tried = len(requests)
    attack.result = (
        f"token in 0 log lines and 0 answers; all {len(requests)} counted, {len(lines)} log lines, "
        f"{sum(map(len, lines))} bytes"
    )


async def everything(served_api: ServedApi) -> str:
    """What users see: events, a device and its explanation, metrics."""
    bearer = {"Authorization": f"Bearer {KNOWN}", "Connection": "close"}
    found = []
    for path in ("/v1/events", "/v1/devices", "/v1/devices/pump/explain", "/v1/status", "/metrics"):
        async with served_api.client.get(served_api.base + path, headers=bearer) as answer:
            found.append(await answer.text())
    return "\n".join(found)


junk = st.sampled_from(
    [
        "\r",
        "\0",
        " ",
        "\n",
        "\t",
        "\x7f",
        "é",
        ":",
        "\r\n ",
        "\r\n\r\n",
        "\x01",
        "%zz",
        "[",
        "\x0b",
        "\udcff",
        "",
    ]
)
heads = st.sampled_from(
    [
        "Authorization: Bearer {}", "Authorization : {}", "{}: x", "X: {}", "{}", "Content-Length: {}",
        "Content-Length: -1", "Transfer-Encoding: chunked", "Transfer-Encoding: {}", "Host: {}",
        "Content-Type: application/json", "Upgrade: {}", "Expect: {}", "Connection: upgrade", "Cookie: a={}",
        "Content-Encoding: {}", "Sec-WebSocket-Key1: {}", "Content-Length: 5\r\nContent-Length: 6",
        "X: {}" + "a" * 9000, "Forwarded: for={}",
    ]
)  # fmt: skip
lines = st.sampled_from(
    [
        "GET /v1/status HTTP/1.1", "{} / HTTP/1.1", "GET {} HTTP/1.1", "GET /{} HTTP/1.1", "POST /v1/webhook HTTP/1.1",
        "GET / HTTP/{}", "GET http://{}:x/ HTTP/1.1", "GET http://[{} HTTP/1.1", "CONNECT {} HTTP/1.1", "{}",
        "PUT /v1/devices/{} HTTP/1.1", "GET /v1/devices?{}=%ff HTTP/1.1", "POST /v1/agents/report HTTP/1.1",
        "GET /" + "a" * 9000 + "{} HTTP/1.1", "PRI * HTTP/2.0", "\x16\x03\x01{}", "GET / HTTP/1.1 {}",
    ]
)  # fmt: skip
bodies = st.sampled_from(
    ["", "{}", '{{"{}":1}}', "{}\r\n{}\r\n0\r\n\r\n", "5;{}\r\nabcde\r\n0\r\n{}\r\n\r\n", "zz\r\n"]
)


@st.composite
def malformed_requests(draw: st.DrawFn) -> list[bytes]:
    """A request with one token in many places, malformed somewhere, in one packet or two."""
    token = draw(st.sampled_from([KNOWN, UNKNOWN]))
    parts = [draw(lines), "Connection: close", *draw(st.lists(heads, max_size=4))]
    text = "\r\n".join(parts).replace("{}", token) + "\r\n\r\n" + draw(bodies).replace("{}", token)
    at = draw(st.integers(0, len(text)))
    raw = (text[:at] + draw(junk) + text[at:]).encode("utf-8", "surrogateescape")
    cut = draw(st.integers(0, len(raw)))
    return [piece for piece in (raw[:cut], raw[cut:]) if piece]


@pytest.mark.parametrize("style", ["json", "text"])
async def test_no_request_that_the_parser_rejects_leaves_a_token_behind(
    tmp_path: Path, style: logs.Format
) -> None:
    """Whatever is wrong with a request, its token is in no answer, in no log record at any level, and in no traceback,
    event or explanation."""
    with no_quarrel_with_pytest(), logged(style) as out:
        async with guarded(tmp_path) as served_api:  # type: ignore[attr-defined]
            port = served_api.runner.addresses[0][1]

            @settings(max_examples=40)
            @given(malformed_requests())
            def fuzz(packets: list[bytes]) -> None:
                answer = asked(port, packets).decode("latin-1")
                assert not any(piece in answer for piece in PIECES), answer

            await asyncio.to_thread(fuzz)
            said = await everything(served_api)
    for text in (said, out.getvalue()):
        assert [line for line in text.splitlines() if any(piece in line for piece in PIECES)] == []
    assert "nomad_watchdog_api_malformed_total 0.0" not in said


async def test_errors_of_handlers_name_no_known_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known token inside an exception, its traceback, an argument of a log call, an event or an invalid body is
    removed from log and answer; one that was only presented is removed from the log while its request is handled."""
    with logged() as out:
        async with guarded(tmp_path) as served_api:  # type: ignore[attr-defined]

            def broken() -> dict[str, object]:
                logging.getLogger("x").debug("plan for %s", KNOWN, extra={"odd": f"'{KNOWN}'"})
                raise RuntimeError(f"said {KNOWN[:-3]}")

            served_api.fleet.attach(FixedLoop(plan=broken))
            served_api.fleet.events.own.add(
                at=0.0, kind="x", device_id="", slug="", text=f"a {KNOWN}", data={"b": [KNOWN]}
            )
            bearer = {"Authorization": f"Bearer {KNOWN}"}
            assert (await served_api.ask("GET", "/v1/plan", headers=bearer))[0] == 500
            _, wrong = await served_api.ask(
                "PUT", "/v1/devices/a", headers=bearer, json={KNOWN: KNOWN}
            )
            _, events = await served_api.ask("GET", "/v1/events", headers=bearer)

            gate = served_api.app_door

            def quoting(*_: object) -> None:
                raise RuntimeError(f"no holder of {UNKNOWN}")

            monkeypatch.setattr(type(gate.keyring), "holder_of", quoting)
            given_ = {"Authorization": f"Bearer {UNKNOWN}"}
            assert (await served_api.ask("GET", "/v1/plan", headers=given_))[0] == 500
    for text in (out.getvalue(), json.dumps(wrong), json.dumps(events)):
        assert [line for line in text.splitlines() if any(piece in line for piece in PIECES)] == []
        assert "[redacted]" in text
    assert "Traceback" in out.getvalue()


async def test_malformed_requests_are_one_line_per_minute(
    served_api: ServedApi, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is logged immediately, those of the next minute together, and the rest at the end."""
    monkeypatch.setattr(malformed, "LOG_EVERY_S", 0.05)
    counter = malformed.MalformedRequests(served_api.metrics)
    counter.add("192.0.2.1")
    for _ in range(1000):
        counter.add("192.0.2.2")
    while len(caplog.records) < 2:
        await asyncio.sleep(0.01)
    counter.add("192.0.2.3")
    counter.close()
    assert [record.requests for record in caplog.records] == [1, 1000, 1]  # type: ignore[attr-defined]
    assert b"nomad_watchdog_api_malformed_total 1002.0" in served_api.metrics.render()
