"""Runs one probe of the agent in a thread, against a server on this test's loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from watchdog_agent.config import probes as config_probes
from watchdog_agent.probes import builtin, command
from watchdog_agent.runtime.loop import Loop

Answer = Callable[[bytes], bytes | None]


def run(
    spec: dict[str, Any], address: str = "127.0.0.1", warnings: list[str] | None = None
) -> tuple[bool | None, str]:
    """(outcome, reason) of one run of a checked probe, on a loop of its own; its warning is appended to `warnings`."""
    loop = Loop()
    answers: list[tuple[bool | None, str]] = []

    def done(ok: bool | None, reason: str, _took_s: float, warning: str) -> None:
        answers.append((ok, reason))
        if warnings is not None:
            warnings.append(warning)
        finish()

    def finish() -> None:
        # killed programs are reaped from the loop
        if command._running:
            loop.later(0.01, finish)
        else:
            loop.stop()

    try:
        builtin.start(loop, spec, address, done)
        loop.later(30.0, loop.stop)
        loop.run()
    finally:
        loop.close()
    (answer,) = answers
    return answer


async def asked(
    address: str = "127.0.0.1", warnings: list[str] | None = None, **spec: Any
) -> tuple[bool | None, str]:
    """(outcome, reason) of one run of this probe; the timeout is ten seconds unless set."""
    return await asyncio.to_thread(
        run, config_probes.check({"timeout_s": 10.0, **spec}, "probe"), address, warnings
    )


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        said = self.answer(data)
        if said is not None:
            self.transport.sendto(said, addr)


@contextlib.asynccontextmanager
async def udp(answer: Answer) -> AsyncIterator[int]:
    """The port of a UDP server that gives these answers."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Udp(answer), local_addr=("127.0.0.1", 0)
    )
    try:
        yield transport.get_extra_info("sockname")[1]
    finally:
        transport.close()


@contextlib.asynccontextmanager
async def tcp(
    speak: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], tls: Any = None
) -> AsyncIterator[int]:
    """The port of a TCP server with this behaviour."""
    from tests.agent.world import Listener

    listener = Listener(speak)
    listener.tls = tls
    await listener.start()
    try:
        yield listener.port
    finally:
        await listener.stop()
