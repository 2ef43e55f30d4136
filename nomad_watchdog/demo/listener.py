"""A TCP server for simulated devices and peers: what it accepted ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable

Speaker = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class DeviceListener:
    """A TCP server whose behaviour (`speak`) can be changed, and which can go and come back.

    `stop` returns when each connection is closed. ``asyncio.Server.close`` alone leaves them open."""

    def __init__(self, speak: Speaker, host: str, port: int) -> None:
        self.speak = speak
        self.host = host
        self.port = port
        self.tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen, if it does not yet. Raises OSError."""
        if self._server is None:
            self._server = await self._open()

    async def _open(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, self.host, self.port, ssl=self.tls)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, TimeoutError, asyncio.IncompleteReadError):
                await self.speak(reader, writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        except asyncio.CancelledError:
            # stop() ends what is still open; asyncio would log it as an error
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def stop(self) -> None:
        """Refuse new connections and end those that are open."""
        server, self._server = self._server, None
        if server is not None:
            loop = asyncio.get_running_loop()
            for sock in server.sockets:
                loop.remove_reader(sock.fileno())
            # What was accepted a moment ago gets its transport and its task in the next turns of the loop. On a server
            # that is closed, asyncio would drop it without closing it (Python 3.11, `Server._attach`).
            try:
                for _ in range(5):
                    await asyncio.sleep(0)
            finally:
                server.close()
            for task in list(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(list(self._tasks), timeout=5)
