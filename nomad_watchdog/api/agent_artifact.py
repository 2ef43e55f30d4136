"""The agent's file, which nodes download."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from aiohttp import web

from nomad_watchdog.api.acceptor import UNSENT, place_of
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.middleware import HEADERS
from nomad_watchdog.errors import NotFoundError
from nomad_watchdog.schedulers import agent_zipapp


async def agent_artifact(request: web.Request) -> web.StreamResponse:
    return await _send(request, request.app[CONTEXT].artifact)


async def agent_file(request: web.Request) -> web.StreamResponse:
    path = request.app[CONTEXT].artifact
    sha256 = request.match_info["id"]
    if path is None or not agent_zipapp.is_checksum(sha256):
        return await _send(request, None)
    file, fetch = agent_zipapp.published(path.parent, sha256), request.app[CONTEXT].fetch_file
    if fetch is not None and "Via" not in request.headers and not file.exists():
        await fetch(sha256)
    return await _send(request, file)


async def _send(request: web.Request, path: Path | None) -> web.StreamResponse:
    body = memoryview(await asyncio.to_thread(_body, path))
    headers = {"Content-Type": "application/zip", **HEADERS}
    if request.method == "HEAD":
        return web.Response(headers={**headers, "Content-Length": str(len(body))})
    response = web.StreamResponse(headers=headers)
    response.content_length = len(body)
    # Not web.FileResponse: with it the kernel sends the file, and a client that reads nothing is not noticed.
    with suppress(ConnectionError):
        await response.prepare(request)
        place_of(request).rest()
        for first in range(0, len(body), UNSENT):
            await response.write(bytes(body[first : first + UNSENT]))
    return response


def _body(path: Path | None) -> bytes:
    if path is not None:
        with suppress(FileNotFoundError), path.open("rb") as file:
            found = os.fstat(file.fileno())
            return _shared(path, found.st_ino, found.st_size, found.st_mtime_ns)
    raise NotFoundError("this server does not have this agent file")


@lru_cache(maxsize=2)
def _shared(path: Path, *_of: int) -> bytes:
    """The file, in memory that all responses share, because there may be many slow clients."""
    return path.read_bytes()
