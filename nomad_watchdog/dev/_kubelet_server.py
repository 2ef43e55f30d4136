"""The one page of a kubelet that the API server asks for: a container's log."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from nomad_watchdog.dev._certificates import Authority

FindLog = Callable[[str, str, str], Path | None]


async def serve_logs(port: int, find: FindLog) -> None:
    """Serve on 127.0.0.1 until cancelled, over TLS with a certificate of its own making."""

    async def answer(request: web.Request) -> web.Response:
        parts = request.match_info
        path = find(parts["namespace"], parts["pod"], parts["container"])
        if path is None or not path.is_file():
            return web.Response(status=404, text="no such container here\n")
        text = (await asyncio.to_thread(path.read_bytes)).decode(errors="replace")
        lines = text.splitlines(keepends=True)
        if (tail := request.query.get("tailLines", "")).isdigit():
            lines = lines[-int(tail) :] if int(tail) else []
        body = "".join(lines)
        if (most := request.query.get("limitBytes", "")).isdigit():
            body = body.encode()[: int(most)].decode(errors="replace")
        return web.Response(text=body)

    app = web.Application()
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        context = await _context()
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _context() -> ssl.SSLContext:
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        await authority.make()
        cert, key = await authority.issue("kubelet", "/CN=kubelet", san="IP:127.0.0.1")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        return context
