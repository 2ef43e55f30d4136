"""A bulk request yields the event loop to other requests."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

import pytest

from nomad_watchdog import clock
from tests.api.conftest import ServedApi, served

ITEMS = 1_000


async def longest(served_api: ServedApi, count: int, name: str) -> float:
    """CPU seconds of the longest step of the loop while `count` items are registered and removed; every third is
    invalid."""
    steps: list[float] = []
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        steps.append(time.thread_time() - began)

    items = [
        {"id": f"{name}-{number}", "address": "10.1.2.3" if number % 3 else "http://x"}
        for number in range(count)
    ]
    gc.collect()
    gc.disable()
    try:
        asyncio.Handle._run = timed  # type: ignore[method-assign]
        for body in (
            {"devices": items},
            {"delete": ["x", *(one["id"] for one in items[1:] if "/" not in one["address"])]},
        ):
            status, answer = await served_api.ask("POST", "/v1/devices:bulk", json=body)
            assert status == 200
            results = answer["results"]
            assert [one["status"] for one in results[:2]] in ([400, 200], [404, 200])
            assert [one["index"] for one in results] == list(range(len(results)))
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]
        gc.enable()
    return max(steps)


@pytest.mark.slow_because("sends 12,000 items, so that a step is measured twice")
async def test_l4_no_step_of_a_bulk_request_grows_with_its_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1,000 items, the longest step of the loop is a fraction of that without yielding, and close to that of 100
    items."""
    async with served(tmp_path, max_body_bytes=1 << 20) as served_api:
        # The lower of two measurements: another process's effect on the cache does not matter here.
        cut = min([await longest(served_api, ITEMS, f"cut{n}") for n in range(2)])
        small = min([await longest(served_api, clock.STEP, f"small{n}") for n in range(2)])
        monkeypatch.setattr(clock, "STEP", ITEMS)
        whole = min([await longest(served_api, ITEMS, f"whole{n}") for n in range(2)])
    figures = f"{cut * 1e3:.1f} ms, of 100 {small * 1e3:.1f} ms, in one piece {whole * 1e3:.1f} ms"
    assert cut < whole / 2, figures
    assert cut < 5 * small, figures
