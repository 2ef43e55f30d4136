"""Requests that are not valid HTTP: counted, answered in one form, and never quoted.

aiohttp itself would log the bytes that it could not parse, which may contain a token, and send them back.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, TypedDict, Unpack

from aiohttp import web

from nomad_watchdog.api.responses import error_response
from nomad_watchdog.metrics import Metrics

log = logging.getLogger(__name__)

LOG_EVERY_S: Final = 60.0


class RunnerOptions(TypedDict, total=False):
    """Options of aiohttp's server for each connection."""

    keepalive_timeout: float
    lingering_time: float
    auto_decompress: bool
    read_bufsize: int
    max_line_size: int
    max_field_size: int
    max_headers: int


RUNNER_OPTIONS: Final[RunnerOptions] = {
    "keepalive_timeout": 60.0,
    "lingering_time": 2.0,
    "auto_decompress": False,
    "read_bufsize": 16 * 1024,
    "max_line_size": 8190,
    "max_field_size": 8190,
    "max_headers": 64,
}
"""Bodies are never decompressed: a few kilobytes could become megabytes before the sender is authenticated. aiohttp
closes a connection whose headers are not complete after keepalive_timeout seconds; with its default of 3,630 a slow
sender could occupy a socket for an hour."""


class MalformedRequests:
    """Counts malformed requests. The first is logged at once, the others as one line per LOG_EVERY_S."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._unlogged = 0
        self._last_peer = ""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, peer: str) -> None:
        """Count a request from this address."""
        self._metrics.malformed()
        self._unlogged += 1
        self._last_peer = peer
        if self._timer is None:
            self._report()

    def _report(self) -> None:
        self._timer = None
        if self._unlogged:
            facts = {"requests": self._unlogged, "last_peer": self._last_peer}
            log.warning("malformed requests", extra=facts)
            self._unlogged = 0
            self._timer = asyncio.get_running_loop().call_later(LOG_EVERY_S, self._report)

    def close(self) -> None:
        """Log the requests that were not logged yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._report()
        if self._timer is not None:
            self._timer.cancel()


class HttpHandler(web.RequestHandler):
    """One connection."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002  # quotes the request
    ) -> web.StreamResponse:
        # The client has disconnected: aiohttp closes the connection without a traceback.
        if isinstance(exc, ConnectionError):
            raise exc
        if status >= 500:
            return super().handle_error(request, status, exc)
        if isinstance(self._manager, HttpServer):
            self._manager.malformed.add(request.remote or "unknown")
        if request.writer.output_size > 0:
            raise ConnectionError("a response was begun")
        answer = error_response(status, "malformed", "the request is not valid HTTP/1.1")
        answer.force_close()
        return answer


MALFORMED: Final = web.AppKey("malformed", MalformedRequests)


class HttpServer(web.Server):
    """Makes a `HttpHandler` per connection."""

    malformed: MalformedRequests

    def __call__(self) -> web.RequestHandler:
        return HttpHandler(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Serves an application of `make_app`, with RUNNER_OPTIONS unless others are given."""

    __slots__ = ()

    def __init__(
        self,
        app: web.Application,
        *,
        shutdown_timeout: float = 60.0,
        **options: Unpack[RunnerOptions],
    ) -> None:
        merged: RunnerOptions = {**RUNNER_OPTIONS, **options}
        super().__init__(app, access_log=None, shutdown_timeout=shutdown_timeout, **merged)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            # Otherwise aiohttp rejects the request before our middleware runs, and sends the header back.
            if request.headers.get("Expect", "100-continue").lower() != "100-continue":
                answer = error_response(417, "expectation_failed", "Expect must be 100-continue")
                answer.force_close()
                return answer
            return await made.request_handler(request)

        server = HttpServer(
            handle,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,  # noqa: SLF001  # what it was made with
            **made._kwargs,  # noqa: SLF001  # as above
        )
        server.malformed = self.app[MALFORMED]
        return server
