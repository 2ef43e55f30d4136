"""Reads the metric of a pool. A metric that cannot be read has no value and a reason; it is never 0."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypedDict, cast

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
    """`value`: None if it cannot be read; `reason` has the cause."""

    value: float | None
    reason: str = ""


class MetricReader:
    """The metrics of all pools of one control plane."""

    def __init__(self, driver: Driver, devices: Callable[[], Mapping[str, int]]) -> None:
        """`devices`: returns the number of devices per verdict."""
        self._driver = driver
        self._devices = devices
        self._http: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def read(self, name: str, pool: PoolSettings) -> Reading:
        """The current value of the pool's metric. Errors of the source are returned as a reason, not raised."""
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
            reason = str(error) or type(error).__name__
            return Reading(None, f"{metric.kind}: {reason[:200]}")

    async def _get(self, metric: MetricSettings, query: Mapping[str, str]) -> object:
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
            found: object = orjson.loads(raw)
        except ValueError as error:
            raise ValueError("the answer is not JSON") from error
        return found


def number_at(document: object, path: str) -> float:
    """The number at ``streams[name=jobs].state.messages`` or ``items[0].depth`` in parsed JSON.

    Raises ValueError with the step at which there is no value, or no number."""
    found = document
    walked = ""
    for key, selector in _PART.findall(path):
        walked += f".{key}" if key else f"[{selector}]"
        found = _child(found, key) if key else _item(found, selector)
        if found is None:
            raise ValueError(f"no value at {walked.lstrip('.')}")
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError(f"no number at {path}")
    return float(found)


def _child(found: object, key: str) -> object:
    """The value of a key; None if there is none."""
    return found.get(key) if isinstance(found, dict) else None


def _item(found: object, selector: str) -> object:
    """The item of a list at an index or, with ``NAME=VALUE``, the first with that value; None if there is none."""
    if not isinstance(found, list):
        return None
    name, equals, value = selector.partition("=")
    if equals:
        matching = (one for one in found if isinstance(one, dict) and str(one.get(name)) == value)
        return next(matching, None)
    return found[at] if (at := whole(selector)) < len(found) else None


class _QueryData(TypedDict):
    resultType: str
    result: list[object]


class _Series(TypedDict):
    value: list[object]


class _QueryResponse(TypedDict, total=False):
    """Response of Prometheus to an instant query (HTTP API, "Instant queries")."""

    status: str
    error: str
    data: _QueryData


def _sample(response: object) -> float:
    """The number in Prometheus's response, which must be a scalar or one series. Raises ValueError."""
    try:
        answer = cast("_QueryResponse", response)
        if answer["status"] != "success":
            raise ValueError(f"prometheus reports: {answer.get('error', 'an unknown error')}")
        kind, result = answer["data"]["resultType"], answer["data"]["result"]
        if kind == "scalar":
            return _finite(result[1])
        if kind != "vector":
            raise ValueError(f"the query returns a {kind}; expected one number")
        if len(result) != 1:
            raise ValueError(f"the query returns {len(result)} series; expected 1: aggregate them")
        return _finite(cast("_Series", result[0])["value"][1])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("the answer is not from Prometheus") from error


def _finite(value: object) -> float:
    try:
        return finite(cast("str", value))
    except (ValueError, TypeError):
        raise ValueError(f"the query returns {ascii(value)[:40].lower()}") from None
