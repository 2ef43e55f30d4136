"""Devices with their own addresses in 127.0.0.0/8, whose services and names a row takes away and gives back."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from nomad_watchdog.demo.listener import DeviceListener
from nomad_watchdog.demo.process import free_port

DNS_PORT: Final = 53
_A: Final = 1
_NO_SUCH_NAME: Final = 3


def own_address() -> str:
    """A random address in 127.0.0.0/8, so that another device very likely has a different one."""
    return f"127.{random.randint(16, 254)}.{random.randint(1, 254)}.{random.randint(1, 254)}"


class Device:
    """Answers HTTP with 200 on its ports. Pings are always answered, because this machine answers them.

    `posted` has the bodies that were posted to it."""

    def __init__(self, ports: Iterable[int]) -> None:
        self.address = own_address()
        self.ports = tuple(ports)
        self.posted: list[Any] = []
        self._listeners = {
            port: DeviceListener(self._answer, self.address, port) for port in self.ports
        }

    async def up(self) -> None:
        """Answer on every port."""
        for listener in self._listeners.values():
            await listener.start()

    async def down(self, *ports: int) -> None:
        """Refuse connections on these ports; none given = on all ports."""
        for port in ports or self.ports:
            await self._listeners[port].stop()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(5.0):
            head = await reader.readuntil(b"\r\n\r\n")
            length = 0
            for line in head.decode("latin-1").split("\r\n"):
                name, _, value = line.partition(":")
                if name.lower() == "content-length":
                    length = int(value)
            if length:
                self.posted.append(json.loads(await reader.readexactly(length)))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            await writer.drain()


@asynccontextmanager
async def open_devices(count: int, ports: int = 1) -> AsyncIterator[list[Device]]:
    """This many devices that answer, each on the same ports."""
    numbers = [free_port() for _ in range(ports)]
    devices = [Device(numbers) for _ in range(count)]
    async with AsyncExitStack() as stack:
        for device in devices:
            stack.push_async_callback(device.down)
            await device.up()
        yield devices


class NameServer(asyncio.DatagramProtocol):
    """Answers queries for A records over UDP. ``async with open_name_server(names) as server``."""

    def __init__(self, names: dict[str, str]) -> None:
        self.address = own_address()
        self.names = names
        self.asked = 0
        self.late_s = 0.0
        """Delay of each answer, in seconds."""
        self._transport: asyncio.DatagramTransport | None = None

    async def up(self) -> None:
        """Answer. Port 53 needs root."""
        if self._transport is None:
            loop = asyncio.get_running_loop()
            where = (self.address, DNS_PORT)
            await loop.create_datagram_endpoint(
                lambda: self, local_addr=where, family=socket.AF_INET
            )

    def down(self) -> None:
        """Close the port: clients get an immediate error and no answer."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        self.asked += 1
        answer = self.answered(data)
        if self.late_s:
            asyncio.get_running_loop().call_later(self.late_s, self._send, answer, addr)
        else:
            self._send(answer, addr)

    def _send(self, answer: bytes, addr: tuple[str | Any, int]) -> None:
        if self._transport is not None:
            self._transport.sendto(answer, addr)

    def answered(self, query: bytes) -> bytes:
        """The answer to one query: an address, nothing for other record types, or that the name does not exist."""
        labels, at = [], 12
        while (length := query[at]) != 0:
            labels.append(query[at + 1 : at + 1 + length].decode("ascii"))
            at += 1 + length
        question = query[12 : at + 5]
        (kind,) = struct.unpack("!H", query[at + 1 : at + 3])
        found = self.names.get(".".join(labels).lower())
        record = b""
        if found is not None and kind == _A:
            record = b"\xc0\x0c" + struct.pack("!HHIH", _A, 1, 0, 4) + socket.inet_aton(found)
        flags = 0x8580 | (_NO_SUCH_NAME if found is None else 0)
        head = query[:2] + struct.pack("!HHHHH", flags, 1, bool(record), 0, 0)
        return head + question + record


@asynccontextmanager
async def open_name_server(names: dict[str, str]) -> AsyncIterator[NameServer]:
    """A running name server with its own address."""
    server = NameServer(names)
    await server.up()
    try:
        yield server
    finally:
        server.down()
