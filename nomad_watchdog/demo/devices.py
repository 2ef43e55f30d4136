"""A simulated fleet: one HTTP endpoint per device, each on its own address of 127.0.0.0/8."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.demo.listener import DeviceListener

ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"


@dataclass(slots=True)
class SimulatedDevice:
    """One device: it answers HTTP on its own loopback address while it is switched on."""

    name: str
    address: str
    port: int
    _listener: DeviceListener = field(init=False)

    def __post_init__(self) -> None:
        self._listener = DeviceListener(self._answer, self.address, self.port)

    async def power_on(self) -> None:
        """Start answering. Linux needs no set-up for the addresses of 127.0.0.0/8."""
        await self._listener.start()

    async def power_off(self) -> None:
        """Stop answering: connections are refused."""
        await self._listener.stop()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(5.0):
            await reader.read(4096)
            writer.write(ANSWER)
            await writer.drain()


class SimulatedFleet:
    """Devices by name."""

    def __init__(self, *, network: int = 1, port: int = 18080) -> None:
        self.network = network
        self.port = port
        self.devices: dict[str, SimulatedDevice] = {}
        self._next = 1

    async def add(self, name: str) -> SimulatedDevice:
        """A new device, switched on."""
        number, self._next = self._next, self._next + 1
        address = f"127.{self.network}.{number // 250}.{number % 250 + 1}"
        device = SimulatedDevice(name, address, self.port)
        await device.power_on()
        self.devices[name] = device
        return device

    async def close(self) -> None:
        """Switch everything off."""
        for device in self.devices.values():
            await device.power_off()
