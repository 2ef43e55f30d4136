"""The two endpoints of a kubelet that other components use: container logs and resource metrics."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from servers.certificates import Authority

FindLog = Callable[[str, str, str], Path | None]


@dataclass(frozen=True, slots=True)
class Use:
    """Usage of one container: CPU seconds since its start, start time (seconds since 1970), and resident bytes."""

    namespace: str
    pod: str
    container: str
    started: float
    cpu_s: float
    memory: int


async def serve_pages(port: int, find: FindLog, uses: Callable[[], Iterable[Use]]) -> None:
    """Serve on 127.0.0.1 until cancelled, over TLS with a self-signed certificate."""

    async def log(request: web.Request) -> web.Response:
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

    async def resource(_: web.Request) -> web.Response:
        return web.Response(text=resource_metrics(list(uses())))

    app = web.Application()
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", log)
    app.router.add_get("/metrics/resource", resource)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        context = await _context()
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def resource_metrics(uses: list[Use]) -> str:
    """The page `/metrics/resource` (kubernetes.io, "Node metrics data"); the node's usage is the sum of its pods."""
    lines = [
        f"node_cpu_usage_seconds_total {sum(one.cpu_s for one in uses):.9f}",
        f"node_memory_working_set_bytes {sum(one.memory for one in uses)}",
    ]
    for one in uses:
        labels = f'{{container="{one.container}",namespace="{one.namespace}",pod="{one.pod}"}}'
        lines += [
            f"container_cpu_usage_seconds_total{labels} {one.cpu_s:.9f}",
            f"container_memory_working_set_bytes{labels} {one.memory}",
            f"container_start_time_seconds{labels} {one.started:.3f}",
        ]
    return "\n".join(lines) + "\n"


async def _context() -> ssl.SSLContext:
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        await authority.make()
        cert, key = await authority.issue("kubelet", "/CN=kubelet", san="IP:127.0.0.1")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        return context
