"""Callers without a token on a real socket: what they cost, and which of them make room for others."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import resource
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from nomad_watchdog.api import Runner, acceptor
from nomad_watchdog.api import listener as serving
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.listener import ApiListener
from nomad_watchdog.config.api import ApiSettings
from tests.api.conftest import ServedApi, served
from tests.api.test_api import WISH
from tests.api.test_malformed import asked
from tests.api.test_tls import write_pair
from tests.attacks import attackers
from tests.attacks.table import Attack

TOKEN = "operators-token-operators-token"
SECRET = "whsec_" + "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}


@dataclass
class Front:
    """The API with a token on the test's own listener."""

    served_api: ServedApi
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def status(self, path: str, method: str = "GET", **options: Any) -> int:
        """Status of a request over a new connection."""
        timeout = aiohttp.ClientTimeout(total=60)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, self.url + path, **options) as answer,
        ):
            await answer.read()
            return answer.status

    def counted(self, text: str) -> float:
        """Value of a series of the metrics."""
        lines = self.served_api.metrics.render().decode().splitlines()
        (value,) = (line.split()[-1] for line in lines if line.startswith(text))
        return float(value)


@asynccontextmanager
async def front(folder: Path, **changes: Any) -> AsyncIterator[Front]:
    (folder / "token").write_text(TOKEN)
    (folder / "webhooks").write_text(SECRET)
    for name in ("token", "webhooks"):
        (folder / name).chmod(0o600)
    guarded = {"token_file": str(folder / "token")} if changes.pop("guarded", True) else {}
    api = ApiSettings(
        listen="127.0.0.1:0",
        webhook_secrets_file=str(folder / "webhooks"),
        unauthenticated_rate=100_000.0,
        **guarded,
    ).model_copy(update=changes)
    async with served(folder, authenticator=authenticator_of(api)) as served_api:
        runner = Runner(served_api.app, shutdown_timeout=2.0)
        await runner.setup()
        listener = ApiListener(runner, api, served_api.metrics)
        await listener.start()
        try:
            yield Front(served_api, listener.port)
        finally:
            await runner.cleanup()


async def answers(port: int, sent: bytes, count: int) -> Counter[str]:
    """Answers to `count` simultaneous connections that send these bytes: a status, or "" if closed without one."""

    async def one() -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(sent)
            return (await reader.read(12))[9:].decode()
        except ConnectionError:
            return ""
        finally:
            writer.close()

    async with asyncio.timeout(120):
        return Counter(await asyncio.gather(*(one() for _ in range(count))))


def memory_kb() -> int:
    """Resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.attack("H1", "a body of 40 MB as 40 kB of gzip, without a token and with one")
async def test_a_compressed_body_is_never_unpacked(tmp_path: Path, attack: Attack) -> None:
    """Eight bodies of 40 MB, compressed by gzip to 40 kB, are rejected with 401, and with 415 if there is a token; no
    memory is used for their content."""
    bomb = attackers.compressed()
    known = bomb.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode(), 1)
    async with front(tmp_path) as it:
        before = peak_kb()
        assert await answers(it.port, bomb, 8) == {"401": 8}
        assert await answers(it.port, known, 8) == {"415": 8}
        grown = (peak_kb() - before) / 1000
        assert it.counted('nomad_watchdog_api_refusals_total{reason="encoding"}') == 8
    assert grown < 20
    attack.tried = 16
    attack.result = f"refused with 401 and 415 before a byte is unpacked; memory +{grown:.0f} MB"


@pytest.fixture
def wires() -> Iterable[list[socket.socket]]:
    """Sockets that are closed at the end."""
    found: list[socket.socket] = []
    yield found
    for wire in found:
        wire.close()


async def connect(port: int, wires: list[socket.socket], count: int, sent: bytes = b"") -> None:
    """Open this many more connections, which send these bytes and read nothing."""
    loop = asyncio.get_running_loop()
    for _ in range(count):
        wire = socket.socket()
        wires.append(wire)
        wire.setblocking(False)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(wire, ("127.0.0.1", port))
        if sent:
            await loop.sock_sendall(wire, sent)


@pytest.mark.attack(
    "H2", "silent connections, and headers that never end, at 64 allowed connections"
)
async def test_silent_connections_make_room(
    tmp_path: Path, attack: Attack, wires: list[socket.socket]
) -> None:
    """With 300 silent or incomplete connections at a limit of 64, health checks and the operator are answered over new
    connections, an open connection of the operator stays, and the process never has more than 64."""
    async with (
        front(tmp_path, max_connections=64, max_connections_per_address=64) as it,
        aiohttp.ClientSession(headers=OPERATOR) as kept,
    ):
        async with kept.get(it.url + "/v1/status") as answer:
            assert answer.status == 200
        opened = it.counted('nomad_watchdog_api_connections{state="authenticated"}')
        for sent in (b"", b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1\r\nX-"):
            await connect(it.port, wires, 150, sent)
        for path, headers in (("/healthz", {}), ("/ready", {}), ("/v1/status", OPERATOR)):
            assert await it.status(path, headers=headers) in {200, 503}
        assert it.counted('nomad_watchdog_api_connections{state="unauthenticated"}') <= 8
        assert it.counted('nomad_watchdog_api_connections_closed_total{reason="room"}') >= 290
        async with kept.get(it.url + "/v1/status") as answer:
            assert answer.status == 200
        assert it.counted('nomad_watchdog_api_connections{state="authenticated"}') >= opened == 1
        closed = it.counted('nomad_watchdog_api_connections_closed_total{reason="room"}')
    attack.tried = 300
    attack.result = f"{closed:.0f} closed for new ones; health checks and the operator are answered"


@pytest.mark.attack("H2", "clients that ask for the agent's file again and again and never read")
async def test_a_client_that_does_not_read_is_closed(
    tmp_path: Path, attack: Attack, wires: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that reads nothing of a file or another response for the write timeout is disconnected and counted."""
    monkeypatch.setattr(acceptor, "WRITE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(acceptor, "SWEEP_S", 0.05)
    token = f"Authorization: Bearer {TOKEN}"
    page = f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n{token}\r\n\r\n".encode()
    async with front(tmp_path) as it:
        (tmp_path / "agent.pyz").write_bytes(bytes(10_000_000))
        await connect(it.port, wires, 5, attackers.deaf()[:400])
        it.served_api.app[CONTEXT].page = (float("inf"), "x" * 10_000_000)
        await connect(it.port, wires, 5, page)
        async with asyncio.timeout(120):
            while it.counted('nomad_watchdog_api_connections_closed_total{reason="slow"}') < 10:
                await asyncio.sleep(0.1)
            for state in ("unauthenticated", "authenticated"):
                while it.counted(f'nomad_watchdog_api_connections{{state="{state}"}}'):
                    await asyncio.sleep(0.1)
    attack.tried = 10
    attack.result = "closed after the write timeout"


ARTIFACT = b"GET /artifacts/watchdog-agent.pyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.slow_because("opens 200 connections, and the first reads 8 MB of a file")
@pytest.mark.attack("H2", "200 clients that read the agent's file at 1 KB per second")
async def test_slow_readers_of_the_agents_file_share_its_memory(
    tmp_path: Path, attack: Attack, wires: list[socket.socket]
) -> None:
    """Each slow reader costs less than 256 KB, however large the file is, and the operator is answered."""
    async with front(tmp_path) as it:
        (tmp_path / "agent.pyz").write_bytes(bytes(8_000_000))
        assert await it.status("/artifacts/watchdog-agent.pyz") == 200
        before = memory_kb()
        await connect(it.port, wires, 200, ARTIFACT)
        async with asyncio.timeout(60):
            while it.counted('nomad_watchdog_api_connections{state="unauthenticated"}') < 200:
                await asyncio.sleep(0.05)
        for _ in range(3):
            for wire in wires:
                with suppress(BlockingIOError):
                    wire.recv(1024)
            assert await it.status("/v1/status", headers=OPERATOR) == 200
        more = memory_kb() - before
    assert more < 200 * 256, f"{more} KB"
    attack.tried = 200
    attack.result = (
        f"the operator is answered; memory +{max(0, more) / 1024:.0f} MB with the attackers'"
    )


async def test_the_handler_of_a_refused_body_ends_with_its_connection(tmp_path: Path) -> None:
    """When the client has disconnected, or was closed to make room, no handler waits for the rest of the body."""
    request = (
        b"PUT /v1/devices/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 900000\r\n\r\n{"
    )
    async with front(tmp_path) as it:
        before = len(asyncio.all_tasks())
        pairs = [await asyncio.open_connection("127.0.0.1", it.port) for _ in range(20)]
        for reader, writer in pairs:
            writer.write(request)
            assert await reader.read(12) == b"HTTP/1.1 401"
        lingering = asyncio.all_tasks()
        assert len(lingering) >= before + len(pairs)
        began = asyncio.get_running_loop().time()
        for _, writer in pairs:
            writer.transport.abort()
        async with asyncio.timeout(60):
            while len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - began < 1.5  # aiohttp itself waits for 2 s


@pytest.mark.attack("H4", "webhooks of 1 MiB with a wrong signature, on 120 connections")
async def test_a_body_is_not_read_before_its_headers_are_plausible(
    tmp_path: Path, attack: Attack
) -> None:
    """A 1 MiB webhook with a wrong signature is rejected unread (413). Without a signature, with half of one or with an
    old timestamp it is 401 unread. A 64 KiB one is read and 401. Memory use does not grow."""
    large, small = attackers.unsigned(), attackers.unsigned(64 * 1024)
    bare = attackers.unsigned().replace(b"webhook-signature", b"x-signature")
    half = attackers.unsigned().replace(b"v1,", b"v1,A")
    old = attackers.unsigned().replace(b"webhook-timestamp: 1", b"webhook-timestamp: 0")
    async with front(tmp_path) as it:
        before = peak_kb()
        assert await answers(it.port, large, 120) == {"413": 120}
        for sent in (bare, half, old):
            assert await answers(it.port, sent, 3) == {"401": 3}
        assert await answers(it.port, small, 20) == {"401": 20}
        grown = (peak_kb() - before) / 1000
        assert it.served_api.app[CONTEXT].bodies.used == 0
    assert grown < 40  # the memory of this process, which includes the attackers
    attack.tried = 149
    attack.result = f"refused before the body is read; memory +{grown:.0f} MB with the attackers'"


async def test_memory_for_bodies_is_bounded(tmp_path: Path) -> None:
    """When it is used up, a request is answered 503 and retried later; no request with a token is lost."""
    async with front(tmp_path) as it:
        bodies = it.served_api.app[CONTEXT].bodies
        bodies.most = 10
        wish: dict[str, Any] = {"json": WISH, "headers": OPERATOR}
        assert await it.status("/v1/devices/cam", "PUT", **wish) == 503
        assert it.counted('nomad_watchdog_api_refusals_total{reason="busy"}') == 1
        bodies.most = 1_000_000
        assert await it.status("/v1/devices/cam", "PUT", **wish) == 201
        assert bodies.used == 0


async def test_silent_handshakes_make_room(tmp_path: Path, wires: list[socket.socket]) -> None:
    """TLS connections that never complete the handshake are counted from the start, and make room."""
    authority = trustme.CA()
    write_pair(tmp_path, authority)
    tls = {name: str(tmp_path / f"server.{name[4:]}") for name in ("tls_cert", "tls_key")}
    async with front(tmp_path, max_connections=32, max_connections_per_address=32, **tls) as it:
        await connect(it.port, wires, 100)
        context = acceptor.ssl.create_default_context()
        authority.configure_trust(context)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"https://127.0.0.1:{it.port}/healthz", ssl=context) as answer,
        ):
            assert answer.status == 200
        assert it.counted('nomad_watchdog_api_connections{state="unauthenticated"}') <= 4


@pytest.fixture
def lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep connections that should be closed, but whose client has not sent everything, open for an hour."""
    monkeypatch.setattr(
        serving, "RUNNER_OPTIONS", {**serving.RUNNER_OPTIONS, "lingering_time": 3600.0}
    )


def end_requests() -> None:
    """End the lingering connections."""
    for task in asyncio.all_tasks():
        coroutine = task.get_coro()
        if getattr(coroutine, "__qualname__", "") == "RequestHandler.start":
            task.cancel()


@pytest.mark.parametrize("body", ["", "Content-Length: 100000\r\n"], ids=["no body", "a body"])
@pytest.mark.usefixtures("lingering")
async def test_an_unknown_expectation_keeps_no_place(
    tmp_path: Path, wires: list[socket.socket], body: str
) -> None:
    """It is rejected with 417 in our format before the token is checked. 40 such open connections leave the 16 places
    for clients without a token to health checks and the operator."""
    sent = f"PUT /v1/devices/x HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: foo\r\n{body}\r\n".encode()
    async with front(tmp_path, max_connections=128) as it:
        head, _, told = (await asyncio.to_thread(asked, it.port, [sent])).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 417 ")
        assert b"\r\nconnection: close" in head.lower()
        assert json.loads(told)["error"]["code"] == "expectation_failed"
        await connect(it.port, wires, 40, sent)
        assert await it.status("/healthz") == 200
        assert await it.status("/v1/status", headers=OPERATOR) == 200
        end_requests()


@pytest.mark.usefixtures("lingering")
async def test_a_refused_sender_that_goes_on_keeps_no_place(
    tmp_path: Path, wires: list[socket.socket]
) -> None:
    """40 connections whose large bodies were rejected, and that send more than is read, leave the places for clients
    without a token to health checks and the operator."""
    head = b"PUT /v1/devices/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10000000\r\n\r\n"
    async with front(tmp_path, max_connections=128) as it:
        await connect(it.port, wires, 40, head + bytes(120_000))
        assert await it.status("/healthz") == 200
        assert await it.status("/v1/status", headers=OPERATOR) == 200
        end_requests()


async def test_an_address_over_its_rate_waits_and_others_do_not(tmp_path: Path) -> None:
    """Unauthenticated requests over the rate are closed unanswered; with a token the same address is served, and its
    requests do not count."""
    async with front(tmp_path, unauthenticated_rate=1.0) as it:
        found = await answers(it.port, b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 40)
        assert 1 <= found["401"] <= 10
        assert found[""] >= 25
        assert it.counted('nomad_watchdog_api_connections_closed_total{reason="rate"}') >= 25


FOREIGN = ("evil.example", "127.0.0.1.evil.example", "evil.example:9670", "", "[::1", "a@127.0.0.1")
OURS = (
    "127.0.0.1",
    "10.1.2.3:9670",
    "[2001:db8::1]:9670",
    "localhost",
    "LOCALHOST.:80",
    "a.localhost",
)


FROM_ANOTHER = {"Sec-Fetch-Site": "cross-site"}


@pytest.mark.attack(
    "H9", "DNS rebinding (a foreign Host), and reads and changes for another site's page"
)
@pytest.mark.parametrize("guarded", [False, True])
async def test_a_browser_changes_nothing_for_another_page(
    tmp_path: Path, attack: Attack, guarded: bool
) -> None:
    """A foreign Host is 421 for every method, a foreign Origin is 403 for every change, and a foreign Sec-Fetch-Site
    for every request except a followed link. Our own, those of the settings, and requests without Origin are served. A
    valid token is served by any name."""
    changes = {"hosts": ("dogs.example",), "advertise": "http://Watch.example:9670"}
    cases = [
        *((421, "GET", {"Host": host}) for host in FOREIGN),
        *((421, "PUT", {"Host": host, "Origin": f"http://{host}"}) for host in FOREIGN),
        *((200, "GET", {"Host": host}) for host in (*OURS, "dogs.example:1", "watch.example")),
        *(
            (403, "PUT", {"Origin": origin})
            for origin in ("http://evil.example", "evil.example", "null", "")
        ),
        *((403, "PUT", {"Origin": f"http://127.0.0.1:{port}"}) for port in (1, 80)),
        *((403, "PUT", {"Sec-Fetch-Site": site}) for site in ("cross-site", "same-site")),
        (200, "PUT", {"Sec-Fetch-Site": "same-origin"}),
        *((403, "GET", {"Sec-Fetch-Site": site}) for site in ("cross-site", "same-site", "")),
        *(
            (403, "GET", FROM_ANOTHER | {"Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": purpose})
            for mode, purpose in (
                ("no-cors", "script"),
                ("no-cors", "image"),
                ("cors", "empty"),
                ("navigate", "iframe"),
                ("navigate", "object"),
                ("no-cors", "document"),
            )
        ),
        (403, "PUT", FROM_ANOTHER | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}),
        (200, "GET", FROM_ANOTHER | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}),
        *((200, "GET", {"Sec-Fetch-Site": site}) for site in ("same-origin", "none")),
        (200, "PUT", {"Host": "dogs.example", "Origin": "https://dogs.example:443"}),
        (200, "GET", {"Origin": "http://evil.example"}),
        (200, "PUT", {}),
    ]
    async with front(tmp_path, guarded=guarded, **changes) as it:
        known = OPERATOR if guarded else {}
        assert await it.status("/v1/devices/cam", "PUT", json=WISH, headers=known) == 201
        for status, method, headers in cases:
            path, body = ("/v1/devices/cam", WISH) if method == "PUT" else ("/v1/status", None)
            found = await it.status(path, method, json=body, headers=headers)
            assert found == (401 if guarded and status == 200 else status), (method, headers)
            if (
                guarded
            ):  # a page of another site has no token; an agent may still use an older name of ours
                assert await it.status(path, method, json=body, headers=known | headers) == 200
                wrong = {"Authorization": "Bearer of-nobody-at-all-123"}
                assert await it.status(path, method, json=body, headers=wrong | headers) == 401
    refused = sum(status > 400 for status, _, _ in cases)
    attack.tried, attack.result = refused, "refused with 421 or 403"


@pytest.mark.attack("H3", "bodies that end in the middle, with a signature that is wrong")
async def test_a_body_that_breaks_off_is_no_error_of_ours(
    tmp_path: Path, attack: Attack, caplog: pytest.LogCaptureFixture
) -> None:
    """An incomplete body is not logged as an error, and the next request is served."""
    caplog.set_level(logging.DEBUG, "aiohttp.server")
    signature = base64.b64encode(b"0" * 32).decode()
    sent = (
        "POST /v1/webhook HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: 1000\r\nwebhook-id: a\r\nwebhook-timestamp: {int(time.time())}\r\n"
        f"webhook-signature: v1,{signature}\r\n\r\n{{"
    ).encode()
    opened = 'nomad_watchdog_api_connections{state="unauthenticated"}'
    async with front(tmp_path) as it:
        for _ in range(50):
            _, writer = await asyncio.open_connection("127.0.0.1", it.port)
            writer.write(sent)
            while not it.served_api.app[CONTEXT].bodies.used:
                await asyncio.sleep(0.001)
            writer.close()
            while it.counted(opened):
                await asyncio.sleep(0.001)
        assert await it.status("/v1/status", headers=OPERATOR) == 200
    assert not [one for one in caplog.records if one.levelname in ("ERROR", "WARNING")]
    attack.tried, attack.result = 50, "nothing in the log, the API goes on"


async def test_a_health_check_without_a_host_is_answered(tmp_path: Path) -> None:
    """Load balancers check with HTTP/1.0, which needs no Host; browsers never send such requests."""
    async with front(tmp_path) as it:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert b" 200 OK\r\n" in await reader.read()
        writer.close()
