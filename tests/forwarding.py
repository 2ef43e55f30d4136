"""Forwarded connections. As a program (PORT, MANY) it is a router in one process: a connection to 127.0.1.N is
forwarded to the device at 127.0.2.N; the router itself answers at 127.0.1.100."""

from __future__ import annotations

import asyncio
import sys

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


async def forward(reader: Reader, writer: Writer, host: str, port: int) -> None:
    """Forward in both directions until both sides have ended; close immediately if nothing listens there."""
    try:
        there = await asyncio.open_connection(host, port)
        try:
            await asyncio.gather(_pipe(reader, there[1]), _pipe(there[0], writer))
        finally:
            there[1].close()  # a pipe that was cancelled before its first step closes nothing
    except OSError:
        pass
    finally:
        writer.close()


async def _pipe(reader: Reader, writer: Writer) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def _route(port: int, many: int) -> None:
    async def pass_on(reader: Reader, writer: Writer, number: int) -> None:
        await forward(reader, writer, f"127.0.2.{number}", port)

    async def answer(_: Reader, writer: Writer) -> None:
        writer.close()

    for number in range(1, many + 1):
        await asyncio.start_server(
            lambda reader, writer, number=number: pass_on(reader, writer, number),
            f"127.0.1.{number}",
            port,
        )
    await asyncio.start_server(answer, "127.0.1.100", port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_route(int(sys.argv[1]), int(sys.argv[2])))
