"""A webhook receiver that distinguishes deliveries from attempts, and can stall or reject them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.agent.world import Listener, silent


class Receiver(Listener):
    """Records requests; `status` is the answer, None = never answers."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.status: int | None = 200
        self.headers = ""
        self.holds = asyncio.Event()
        """Set: answers; cleared: a recorded request waits for its answer."""
        self.holds.set()
        self.attempts: list[dict[str, Any]] = []
        """Each has `path`, `headers` (names in lower case), `body` and the answered `status`."""

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        assert lines[0].split(" ")[1].startswith("/"), lines[0]
        raw = await reader.readexactly(int(headers["content-length"]))
        status = self.status
        self.attempts.append(
            {
                "method": lines[0].split()[0],
                "path": lines[0].split()[1],
                "headers": headers,
                "body": json.loads(raw) if raw else None,
                "status": status,
            }
        )
        if status is None:
            await silent(reader, writer)
            return
        await self.holds.wait()
        writer.write(f"HTTP/1.1 {status} X\r\n{self.headers}Content-Length: 0\r\n\r\n".encode())
        await writer.drain()

    @property
    def delivered(self) -> list[dict[str, Any]]:
        """The bodies of the requests that were answered with 2xx."""
        return [one["body"] for one in self.attempts if one["status"] in (200, 204)]

    def told(self, status: str) -> list[dict[str, Any]]:
        """The delivered alerts with this status."""
        return [one for one in self.delivered if one["status"] == status]
