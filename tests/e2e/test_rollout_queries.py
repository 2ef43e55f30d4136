"""Roll-outs that a query of a real Prometheus judges."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from nomad_watchdog.clients.prometheus import Source, query
from nomad_watchdog.demo.process import free_port
from servers.prometheus import PrometheusServer
from tests.agent.world import OK, Listener, says
from tests.e2e.test_apply import Patient
from tests.e2e.test_program import directory
from tests.schedulers.conftest import eventually

__all__ = ["directory"]

CONFIG = """\
data_dir = "{root}"
api {{ listen = "127.0.0.1:{port}" }}
rollout {{
  step {{ soak = "2s" }}
  well_before = "1s"
  analysis {{
    url      = "{prometheus}"
    query    = "sum(gateway_errors)"
    max      = 1
    failures = 2
    interval = "1s"
    timeout  = "1s"
  }}
}}
agent_class "default" {{
  version = "{version}"
  beat    = "500ms"
  probe "tcp" {{
    port     = {device}
    interval = "1s"
    timeout  = "500ms"
  }}
}}
"""


@asynccontextmanager
async def exporter(errors: dict[str, float]) -> AsyncIterator[int]:
    """A page of metrics: `gateway_errors` of each gateway. Yields its port."""

    async def answer(_: web.Request) -> web.Response:
        lines = (f'gateway_errors{{gateway="{name}"}} {value}\n' for name, value in errors.items())
        return web.Response(text="".join(lines))

    app, port = web.Application(), free_port()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield port
    finally:
        await runner.cleanup()


@pytest.mark.slow_because(
    "four roll-outs of the program, and a Prometheus that is stopped and started"
)
async def test_a_version_goes_on_or_back_by_what_prometheus_measures(
    tmp_path: Path, directory: Path
) -> None:  # it stops the agents
    """Without errors version 2 is rolled out. While Prometheus does not run, version 3 waits, and is complete when it is
    back. Version 4 is taken back when the gateways report errors, although all devices are well."""
    device, program = Listener(says(OK)), Patient(tmp_path)
    await device.start()
    errors = {"a": 0.0, "b": 0.0}

    async def rolled_out() -> Any:
        return await program.get("/v1/rollouts/default")

    async def has(state: str, reason: str = "") -> bool:
        found = await rolled_out()
        return found["state"] == state and reason in found["reason"]

    async def measures(value: float) -> bool:
        async with aiohttp.ClientSession() as http:
            return await query(http, Source(prometheus.url), "sum(gateway_errors)") == value

    async with exporter(errors) as port:
        prometheus = PrometheusServer(tmp_path / "prometheus", [f"127.0.0.1:{port}"])

        async def configure(version: str) -> None:
            text = CONFIG.format(
                root=tmp_path,
                port=program.port,
                device=device.port,
                version=version,
                prometheus=prometheus.url,
            )
            program.file.write_text(text)
            if version != "1":
                await program.ask("POST", "/v1/config:reload")
                await eventually(lambda: _is_version(rolled_out(), version), 30.0)

        await configure("1")
        try:
            async with program.running():
                async with prometheus:
                    await program.import_devices("d1", "d2", "d3")
                    await eventually(lambda: has("complete"), 90.0)
                    await configure("2")
                    await eventually(lambda: has("complete"), 90.0)
                await configure("3")
                unread = "the query can't be read: no connection to 127.0.0.1:"
                await eventually(lambda: has("soaking", unread), 90.0)
                async with prometheus:
                    await eventually(lambda: has("complete"), 90.0)
                    assert (await rolled_out())["ok"] == 3
                    errors["b"] = 5.0
                    # Until its first scrape after a start, Prometheus returns the last value before it.
                    await eventually(lambda: measures(5.0), 30.0)
                    await configure("4")
                    why = "the query returns 5, more than 1 (max), 2 times in a row"
                    await eventually(lambda: has("aborted", why), 90.0)
        finally:
            await device.stop()


async def _is_version(found: Any, wanted: str) -> bool:
    return bool((await found)["version"] == wanted)
