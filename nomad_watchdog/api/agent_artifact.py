"""The agent as one file, for nodes that fetch it."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from aiohttp import web

from nomad_watchdog.api.acceptor import UNSENT, place_of
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.middleware import HEADERS
from nomad_watchdog.errors import NotFoundError
from nomad_watchdog.schedulers import agent_zipapp


async def agent_artifact(request: web.Request) -> web.StreamResponse:
    return await _sent(request, request.app[CONTEXT].artifact)


async def agent_file(request: web.Request) -> web.StreamResponse:
    path = request.app[CONTEXT].artifact
    sha256 = request.match_info["id"]
    if path is None or not agent_zipapp.is_checksum(sha256):
        return await _sent(request, None)
    return await _sent(request, agent_zipapp.published(path.parent, sha256))


async def _sent(request: web.Request, path: Path | None) -> web.StreamResponse:
    with await asyncio.to_thread(_opened, path) as file:
        headers = {"Content-Type": "application/zip", **HEADERS}
        size = os.fstat(file.fileno()).st_size
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(size)})
        response = web.StreamResponse(headers=headers)
        response.content_length = size
        # Not web.FileResponse: the kernel sends a file for it, and nobody notices that the other side takes none.
        with suppress(ConnectionError):
            await response.prepare(request)
            place_of(request).rest()
            while chunk := await asyncio.to_thread(file.read, 4 * UNSENT):
                await response.write(chunk)
        return response


def _opened(path: Path | None) -> BinaryIO:
    if path is not None:
        with suppress(FileNotFoundError):
            return path.open("rb")
    raise NotFoundError("this server does not have this agent file")
