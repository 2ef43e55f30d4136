"""Reads the metric that a pool follows. What can't be read is no number and a reason, never a 0."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson
from watchdog_agent.runtime.parsing import finite, whole

from nomad_watchdog import text_files
from nomad_watchdog.config.pools import MetricSettings, PoolSettings
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.pools import Driver

MAX_BYTES: Final = 8 * 1024 * 1024
_PART: Final = re.compile(r"([^.\[\]]+)|\[([^\[\]]*)\]")


@dataclass(frozen=True, slots=True)
class Reading:
    """`value` None: `reason` says why there is none."""

    value: float | None
    reason: str = ""


class MetricReader:
    """The metrics of all pools of one control plane."""

    def __init__(self, driver: Driver, devices: Callable[[], Mapping[str, int]]) -> None:
        """`devices`: how many devices there are by verdict."""
        self._driver = driver
        self._devices = devices
        self._http: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def read(self, name: str, pool: PoolSettings) -> Reading:
        """The pool's metric now. Never raises for what is wrong outside."""
        metric = pool.metric[0]
        try:
            match metric.kind:
                case "cpu" | "memory":
                    used = await self._driver.usage(name, pool)
                    if used is None:
                        return Reading(None, "not all running workers can be measured")
                    return Reading(used.cpu if metric.kind == "cpu" else used.memory)
                case "devices":
                    return Reading(float(self._devices().get(str(metric.verdict), 0)))
                case "queue":
                    answer = await self._get(metric, {})
                    return Reading(number_at(answer, metric.value or ""))
                case "prometheus":
                    return Reading(_sample(await self._get(metric, {"query": metric.query or ""})))
        except (
            WatchdogError,
            ValueError,
            LookupError,
            TypeError,
            OSError,
            aiohttp.ClientError,
        ) as error:
            said = str(error) or type(error).__name__
            return Reading(None, f"{metric.kind}: {said[:200]}")

    async def _get(self, metric: MetricSettings, query: Mapping[str, str]) -> Any:
        """The JSON at the metric's address. Raises ValueError and aiohttp's errors."""
        address = metric.url or ""
        if metric.kind == "prometheus":
            address = f"{address.rstrip('/')}/api/v1/query"
        headers = {}
        if metric.token_file:
            token = await asyncio.to_thread(text_files.token, "token_file", metric.token_file)
            headers["Authorization"] = f"Bearer {token}"
        if self._http is None:
            self._http = aiohttp.ClientSession()
        timeout = aiohttp.ClientTimeout(total=metric.timeout)
        async with self._http.get(
            address, params=query or None, headers=headers, timeout=timeout, allow_redirects=False
        ) as answer:
            raw = bytearray()
            async for piece in answer.content.iter_chunked(65536):
                raw += piece
                if len(raw) > MAX_BYTES:
                    raise ValueError(f"the answer is larger than {MAX_BYTES} bytes")
            if answer.status != 200:
                raise ValueError(f"HTTP {answer.status}")
        try:
            return orjson.loads(raw)
        except ValueError as error:
            raise ValueError("the answer is no JSON") from error


def number_at(document: Any, path: str) -> float:
    """The number at ``streams[name=jobs].state.messages`` or ``items[0].depth`` in parsed JSON.

    Raises ValueError that says at which step there is nothing, or no number."""
    found = document
    walked = ""
    for key, pick in _PART.findall(path):
        walked += f".{key}" if key else f"[{pick}]"
        found = found.get(key) if key and isinstance(found, dict) else _picked(found, key, pick)
        if found is None:
            raise ValueError(f"nothing at {walked.lstrip('.')}")
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError(f"no number at {path}")
    return float(found)


def _picked(found: Any, key: str, pick: str) -> Any:
    if key or not isinstance(found, list):
        return None
    name, equals, wanted = pick.partition("=")
    if equals:
        named = (one for one in found if isinstance(one, dict) and str(one.get(name)) == wanted)
        return next(named, None)
    return found[at] if (at := whole(pick)) < len(found) else None


def _sample(answer: Any) -> float:
    """The one number of Prometheus's answer (HTTP API, "Instant queries"). Raises ValueError."""
    try:
        if answer["status"] != "success":
            raise ValueError(f"prometheus says: {answer.get('error', 'no success')}")
        kind, result = answer["data"]["resultType"], answer["data"]["result"]
        if kind == "scalar":
            return _finite(result[1])
        if kind != "vector":
            raise ValueError(f"the query gives a {kind}; wanted is one number")
        if len(result) != 1:
            raise ValueError(f"the query gives {len(result)} series; wanted is 1: aggregate it")
        return _finite(result[0]["value"][1])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("the answer is not Prometheus's") from error


def _finite(text: Any) -> float:
    try:
        return finite(text)
    except (ValueError, TypeError):
        raise ValueError(f"the query gives {ascii(text)[:40].lower()}") from None
