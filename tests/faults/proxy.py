"""An HTTP proxy in front of a real server, which injects faults of networks and servers.

Without a rule everything is passed on unchanged, including streams and long waits.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web
from yarl import URL

from nomad_watchdog.demo.process import free_port

_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "host", "content-length"}


@dataclass(frozen=True, slots=True)
class Answer:
    """The real server's answer."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Exchange:
    """One request in progress."""

    request: web.Request
    body: bytes
    proxy: Proxy

    async def forward(self) -> Answer:
        """Pass the request on to the real server."""
        async with self.proxy.send(self.request, self.body) as answer:
            headers = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
            return Answer(answer.status, headers, await answer.read())

    def abort(self) -> web.StreamResponse:
        """Break the connection without sending anything more."""
        if self.request.transport is not None:
            self.request.transport.abort()
        return web.Response()


Fault = Callable[[Exchange], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Rule:
    """Which requests get a fault, and how many did."""

    method: str
    path: re.Pattern[str]
    fault: Fault
    left: int
    hits: int = 0
    hit: asyncio.Event = field(default_factory=asyncio.Event)

    def off(self) -> None:
        """Disable the rule."""
        self.left = 0

    def takes(self, request: web.Request) -> bool:
        if self.left <= 0 or self.method not in (request.method, "*"):
            return False
        if not self.path.search(request.rel_url.raw_path_qs):
            return False
        self.left -= 1
        self.hits += 1
        self.hit.set()
        return True


class Proxy:
    """``async with Proxy(server_url) as proxy: … proxy.url``."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.rstrip("/")
        self.url = f"http://127.0.0.1:{free_port()}"
        self.rules: list[Rule] = []
        self.requests = 0
        self._http: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
            auto_decompress=False,
            skip_auto_headers=["Accept-Encoding"],
        )
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", URL(self.url).port).start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._runner is not None
        assert self._http is not None
        await self._runner.cleanup()
        await self._http.close()

    def when(self, method: str, path: str, fault: Fault, *, times: int = 1_000_000) -> Rule:
        """Apply `fault` to the next `times` requests with this method (* = any) and a matching path; the newest rule is
        tried first."""
        rule = Rule(method, re.compile(path), fault, times)
        self.rules.insert(0, rule)
        return rule

    def clear(self) -> None:
        """Remove all rules."""
        for rule in self.rules:
            rule.off()
        self.rules.clear()

    def send(self, request: web.Request, body: bytes) -> Any:
        """Send the same request to the real server."""
        assert self._http is not None
        left_out = {*_HOP, "accept-encoding"}  # an edit reads the body
        headers = {k: v for k, v in request.headers.items() if k.lower() not in left_out}
        where = URL(self.upstream + request.rel_url.raw_path_qs, encoded=True)
        return self._http.request(request.method, where, headers=headers, data=body or None)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        body = await request.read()
        try:
            for rule in self.rules:
                if rule.takes(request):
                    return await rule.fault(Exchange(request, body, self))
            return await self._pass_on(request, body)
        except aiohttp.ClientError:  # the server itself is gone, so the proxy fails too
            return Exchange(request, body, self).abort()

    async def _pass_on(self, request: web.Request, body: bytes) -> web.StreamResponse:
        async with self.send(request, body) as answer:
            return await relay_stream(request, answer, lambda chunk: [chunk])


async def relay_stream(
    request: web.Request, answer: aiohttp.ClientResponse, edit: Callable[[bytes], list[bytes]]
) -> web.StreamResponse:
    """Send the data as it arrives; `edit` may change, drop or repeat a chunk."""
    out = web.StreamResponse(status=answer.status)
    for name, value in answer.headers.items():
        if name.lower() not in _HOP:
            out.headers[name] = value
    await out.prepare(request)
    with suppress(ConnectionError):
        async for chunk in answer.content.iter_any():
            for piece in edit(chunk):
                await out.write(piece)
        await out.write_eof()
    return out


def relayed(answer: Answer) -> web.Response:
    """The real answer, unchanged."""
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


def lost_answer(then: Callable[[], Any] = lambda: None) -> Fault:
    """The request is processed, and its answer never arrives. `then` is called in between."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        await exchange.forward()
        then()
        return exchange.abort()

    return fault


def lost_request(then: Callable[[], Any] = lambda: None) -> Fault:
    """The request arrives completely, `then` is called, and only then it is processed, without an answer."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        then()
        await exchange.forward()
        return exchange.abort()

    return fault


def repeated(times: int = 2, *, tell: int = 0) -> Fault:
    """The request arrives this many times at once; the answer to number `tell` is returned."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        answers = await asyncio.gather(*(exchange.forward() for _ in range(times)))
        return relayed(answers[tell])

    return fault


def late(seconds: float) -> Fault:
    """Processed immediately, answered after this delay."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        answer = await exchange.forward()
        await asyncio.sleep(seconds)
        return relayed(answer)

    return fault


def cut(share: float = 0.5) -> Fault:
    """The headers promise the whole body; this share of it is sent, then the connection breaks."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        answer = await exchange.forward()
        out = web.StreamResponse(status=answer.status, headers=answer.headers)
        out.content_length = len(answer.body)
        await out.prepare(exchange.request)
        await out.write(answer.body[: int(len(answer.body) * share)])
        return exchange.abort()

    return fault


def instead(status: int, body: bytes = b"", **headers: str) -> Fault:
    """An answer that the real server never sent; the request does not reach it."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=body, headers=named)

    return fault


def edited(edit: Callable[[Any], Any]) -> Fault:
    """The real answer with changed JSON, and the same index and other headers."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        answer = await exchange.forward()
        if answer.status != 200:
            return relayed(answer)
        body = json.dumps(edit(json.loads(answer.body))).encode()
        return relayed(Answer(answer.status, answer.headers, body))

    return fault


def silent(released: asyncio.Event) -> Fault:
    """A stream that opens and then sends nothing, not even heartbeats, until released."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        out = web.StreamResponse()
        await out.prepare(exchange.request)
        await released.wait()
        return exchange.abort()

    return fault


def lines(edit: Callable[[int, bytes], list[bytes]]) -> Fault:
    """A stream in which `edit` (number, line) decides what happens to each line."""

    async def fault(exchange: Exchange) -> web.StreamResponse:
        rest, count = b"", 0

        def cut_up(chunk: bytes) -> list[bytes]:
            nonlocal rest, count
            *whole, rest = (rest + chunk).split(b"\n")
            out: list[bytes] = []
            for line in whole:
                out += [piece + b"\n" for piece in edit(count, line)]
                count += 1
            return out

        async with exchange.proxy.send(exchange.request, exchange.body) as answer:
            return await relay_stream(exchange.request, answer, cut_up)

    return fault
