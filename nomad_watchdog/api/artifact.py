"""The agent as one file, for nodes that fetch it."""

from __future__ import annotations

from contextlib import suppress

from aiohttp import web

from nomad_watchdog.api.acceptor import UNSENT, place_of
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.errors import HEADERS
from nomad_watchdog.errors import NotFoundError


async def agent_artifact(request: web.Request) -> web.StreamResponse:
    path = request.app[CONTEXT].artifact
    if path is None or not path.is_file():
        raise NotFoundError("this server offers no agent file")
    headers = {"Content-Type": "application/zip", **HEADERS}
    size = path.stat().st_size
    if request.method == "HEAD":
        return web.Response(headers={**headers, "Content-Length": str(size)})
    response = web.StreamResponse(headers=headers)
    response.content_length = size
    # Not web.FileResponse: the kernel sends a file for it, and nobody notices that the other side takes none of it.
    with suppress(ConnectionError), path.open("rb") as file:
        await response.prepare(request)
        place_of(request).rest()
        while chunk := file.read(UNSENT):
            await response.write(chunk)
    return response
