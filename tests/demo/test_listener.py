"""The listener of simulated devices."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import warnings

import pytest

from nomad_watchdog.demo.listener import DeviceListener
from nomad_watchdog.demo.process import free_port


@pytest.mark.parametrize("turns", range(7))
async def test_what_was_accepted_as_it_stops_is_closed(turns: int) -> None:
    """Connections that were accepted 0 to 6 turns of the event loop earlier get an end of file, and none is left for
    the garbage collector to close."""

    async def speak(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    listener = DeviceListener(speak, "127.0.0.1", free_port())
    await listener.start()
    clients = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(3)]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(turns):
                await asyncio.sleep(0)
            await listener.stop()
            gc.collect()
        assert not caught, [str(one.message) for one in caught]
        for client in clients:
            client.settimeout(5.0)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
    finally:
        for client in clients:
            client.close()
