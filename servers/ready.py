"""Waits until a started server responds."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import aiohttp

from nomad_watchdog.demo.process import Process
from nomad_watchdog.errors import TerminalError

_POLL_S: Final = 0.05
_CALL_S: Final = 2.0


def pause_s(waited_s: float, least_s: float = 0.02, most_s: float = 0.1) -> float:
    """Seconds until the next of many polls: a twentieth of the time waited so far, within the limits.

    Each poll uses CPU time here and in the server, which the awaited operation may need."""
    return min(max(least_s, waited_s / 20), most_s)


async def until_ok(process: Process, url: str, timeout_s: float) -> None:
    """Wait until `url` returns 200.

    Raises TerminalError with the end of the log on timeout, or if the process has ended."""
    deadline = time.monotonic() + timeout_s
    timeout = aiohttp.ClientTimeout(total=_CALL_S)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        while not await _is_ok(http, url):
            if process.returncode is not None or time.monotonic() > deadline:
                raise TerminalError(
                    f"{process.name} did not get ready; its log {process.log} ends:\n"
                    f"{process.log_tail()}"
                )
            await asyncio.sleep(_POLL_S)


async def _is_ok(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
