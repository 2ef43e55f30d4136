"""python-nomad against aiohttp for dispatch: 500 each way of a mock_driver parent on a real Nomad."""

from __future__ import annotations

import asyncio
import base64
import tempfile
import time
from pathlib import Path
from typing import Any

import nomad

from nomad_watchdog.clients.nomad import NomadClient, NomadSettings
from nomad_watchdog.dev.nomad import NomadServer

COUNT = 500
_KEYS = ("device_id", "slug", "epoch", "spec_hash", "agent_class", "shard")
_TEMPLATE = Path(__file__).resolve().parents[1] / "tests/schedulers/mock.nomad.hcl"


def _body(number: int) -> dict[str, Any]:
    return {
        "Meta": dict.fromkeys(_KEYS, str(number)),
        "Payload": base64.b64encode(b"{}").decode(),
        "IdempotencyToken": str(number),
    }


async def _measure() -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        async with NomadServer(Path(folder) / "nomad") as server:
            client = NomadClient(NomadSettings(address=server.http_addr))
            try:
                # a pool without nodes: nothing is placed, so only the clients and the server work
                job = await client.parse(_TEMPLATE.read_text(), 'pool = "all"')
                job["Datacenters"] = ["nowhere"]
                for name in ("library", "aiohttp"):
                    await client.register({**job, "ID": name, "Name": name})
                library = nomad.Nomad(address=server.http_addr, timeout=15)

                def through_library() -> None:
                    for number in range(COUNT):
                        library.job.request(
                            "library", "dispatch", json=_body(number), method="post"
                        )

                for name in ("library", "aiohttp"):
                    wall, cpu = time.perf_counter(), time.process_time()
                    if name == "library":
                        await asyncio.to_thread(through_library)
                    else:
                        for number in range(COUNT):
                            await client.dispatch("aiohttp", _body(number))
                    took, used = time.perf_counter() - wall, time.process_time() - cpu
                    rows += [
                        _row(f"nomad dispatch by {name}", COUNT / took, "1/s"),
                        _row(f"nomad dispatch by {name}, CPU", used / COUNT * 1e6, "us"),
                    ]
            finally:
                await client.close()
    return rows


def _row(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": round(value, 1), "unit": unit, "floor": None, "aim": None}


def run() -> list[dict[str, Any]]:
    return asyncio.run(_measure())


if __name__ == "__main__":
    for row in run():
        print(row)
