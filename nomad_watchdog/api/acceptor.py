"""Accepts connections while there are places for them (`connection_limits`), and closes stuck ones."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import resource
import socket
import ssl
import termios
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from aiohttp import web

from nomad_watchdog.api.connection_limits import MIN_PLACES, ConnectionLimits, Place, network_of
from nomad_watchdog.api.malformed import HttpHandler, RunnerOptions
from nomad_watchdog.clock import Clock
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.metrics.labels import Closing

log = logging.getLogger(__name__)

BATCH: Final = 32
"""Maximum number of connections that are accepted in one step of the event loop."""
HANDSHAKE_TIMEOUT_S: Final = 10.0
SHUTDOWN_TIMEOUT_S: Final = 5.0
"""Both of TLS."""
WRITE_TIMEOUT_S: Final = 10.0
"""A connection whose client reads nothing of a response for this time is closed."""
SWEEP_S: Final = 2.0
EXHAUSTED_S: Final = 1.0
"""Pause after the process or the system ran out of file descriptors or memory, as in asyncio."""
CROWDED_S: Final = 0.005
"""Pause while every unauthenticated connection has sent bytes that will be read soon."""
LOG_EVERY_S: Final = 10.0
RECEIVED_AT_ONCE: Final = 16 * 1024
"""Bytes that are read at once; asyncio's default is 16 times this."""
UNSENT: Final = 16 * 1024
"""Maximum bytes of responses in memory that a connection has not read."""
_PLACE: Final = web.RequestKey("place", Place)
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Connection(HttpHandler):
    """A connection that has a place."""

    __slots__ = ("_answered", "_hushed", "_stuck_since", "_wire", "place")

    def __init__(self, place: Place, server: web.Server, options: RunnerOptions) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(server, loop=loop, access_log=None, **options)  # type: ignore[arg-type]  # None disables it
        self.place = place
        self._wire: asyncio.Transport | None = None
        self._answered = False
        self._hushed = False
        self._stuck_since: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._wire = transport
        self.place.close = transport.abort
        transport.set_write_buffer_limits(high=UNSENT)
        if hasattr(transport, "max_size"):  # not with TLS, whose buffer is made before this
            transport.max_size = RECEIVED_AT_ONCE
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.place.leave()
        # A request that was refused unread is done, but its handler would wait for the rest of the body.
        lingering = self._task_handler if self._hushed and self._answered else None
        super().connection_lost(exc)
        if lingering is not None:
            lingering.cancel()

    def data_received(self, data: bytes) -> None:
        if self._hushed:
            self._pause()
            return
        super().data_received(data)
        if self._messages:  # a request is complete, and will be handled
            self.place.work()

    async def finish_response(
        self, request: web.BaseRequest, response: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        # Also called for responses that aiohttp makes itself.
        try:
            return await super().finish_response(request, response, start_time)
        finally:
            self._answered = True
            self.place.rest()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck_since = self._loop.time()
        self.place.rest()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stuck_since = None

    def hush(self) -> None:
        """Read nothing more. The response is still sent, and aiohttp closes after `lingering_time`: closing at once
        would reset the connection and lose the response."""
        self._hushed, self._answered = True, False
        self.place.unread = _nothing  # further bytes are not waited for
        self._pause()

    def _pause(self) -> None:
        if self._wire is not None and not self._wire.is_closing():
            self._wire.pause_reading()

    def stuck_s(self, now: float) -> float:
        """Seconds for which the client has read nothing of a response."""
        wire = self._wire
        if wire is not None and wire.is_closing() and self._stuck_since is None:
            self._stuck_since = now  # less than UNSENT is left, so that writing was not paused
        return 0.0 if self._stuck_since is None else now - self._stuck_since


def place_of(request: web.Request) -> Place:
    """The place of the request's connection; one without limits if the application is served without `Site`."""
    protocol = request.protocol
    if isinstance(protocol, Connection):
        return protocol.place
    if _PLACE not in request:
        request[_PLACE] = Place(None, "")
    return request[_PLACE]


def _nothing() -> bool:
    return False


def _unread(wire: socket.socket) -> bool:
    """Whether the kernel has bytes of this socket that were not read."""
    count = array("i", [0])
    try:
        fcntl.ioctl(wire.fileno(), termios.FIONREAD, count)
    except (OSError, ValueError):  # it was closed
        return False
    return count[0] > 0


class Site(web.BaseSite):
    """Serves a runner's application on a listening socket. `options`: as `web.AppRunner` takes them."""

    __slots__ = ("_options", "_places", "_socket", "_sweeping", "_tasks")

    def __init__(
        self,
        runner: web.AppRunner,
        listening: socket.socket,
        places: ConnectionLimits,
        options: RunnerOptions,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(runner, ssl_context=ssl_context)
        self._socket, self._places, self._options = listening, places, options
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return str(self._socket.getsockname())

    async def start(self) -> None:
        await super().start()
        self._listen()
        self._sweep()

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._socket.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().stop()

    def _listen(self) -> None:
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(BATCH):
            if not self._places.room():
                self._pause(CROWDED_S)
                return
            try:
                accepted, peer = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                what = "socket.accept() out of system resource"
                loop.call_exception_handler({"message": what, "exception": error})
                self._pause(EXHAUSTED_S)
                return
            place = self._places.admit(network_of(peer[0]))
            if place is None:
                accepted.close()
                continue
            accepted.setblocking(False)
            task = loop.create_task(self._open(accepted, place))
            place.close = task.cancel
            place.unread = partial(_unread, accepted)
            self._tasks.add(task)
            task.add_done_callback(partial(self._opened, accepted, place))

    def _pause(self, for_s: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        loop.call_later(for_s, self._listen)

    async def _open(self, accepted: socket.socket, place: Place) -> None:
        server = self._runner.server
        assert server is not None
        if place.wait_s:
            await asyncio.sleep(place.wait_s)
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: Connection(place, server, self._options),
            accepted,
            ssl=self._ssl_context,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if self._ssl_context else None,
            ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S if self._ssl_context else None,
        )

    def _opened(self, accepted: socket.socket, place: Place, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            place.leave()
            accepted.close()
        if error is not None and not isinstance(error, OSError):
            log.error("connection failed", exc_info=error)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for one in self._runner.server.connections if self._runner.server else ():
            if isinstance(one, Connection) and one.stuck_s(now) > WRITE_TIMEOUT_S:
                one.place.close_as_slow()
        self._sweeping = loop.call_later(SWEEP_S, self._sweep)


@dataclass(slots=True)
class Closings:
    """Counts the connections that the server closes, and logs at most one line about them per LOG_EVERY_S."""

    metrics: Metrics
    clock: Clock
    _logged_at: float = float("-inf")
    _since: Counter[str] = field(default_factory=Counter)

    def __call__(self, why: Closing) -> None:
        self.metrics.connection_closed(why)
        self._since[why] += 1
        now = self.clock.monotonic()
        if now - self._logged_at < LOG_EVERY_S:
            return
        log.warning("connections closed", extra={"reasons": dict(self._since)})
        self._logged_at = now
        self._since.clear()


def most_connections(wanted: int) -> int:
    """`wanted`, or less if the process may not have twice as many open files. The other half is for its agents,
    the registry, the scheduler and the event store. Raises the soft limit of open files if necessary."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 2 * wanted
    if soft != resource.RLIM_INFINITY and soft < enough:
        raised = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
        with suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= enough:
        return wanted
    most = max(MIN_PLACES, soft // 2)
    log.warning(
        "fewer connections than api.max_connections: the limit of open files is too low",
        extra={"connections": most, "wanted": wanted, "open_files": soft, "needed": enough},
    )
    return most
