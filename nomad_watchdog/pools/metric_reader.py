"""Reads the metric of a pool. A metric that cannot be read has no value and a reason; it is never 0."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp
from watchdog_agent.runtime.parsing import whole

from nomad_watchdog.clients import prometheus
from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.pools import Driver

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
        source = prometheus.Source(metric.url or "", metric.token_file or "", metric.timeout)
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
                    answer = await prometheus.read_json(self._session(), source)
                    return Reading(number_at(answer, metric.value or ""))
                case "prometheus":
                    query = metric.query or ""
                    return Reading(await prometheus.query(self._session(), source, query))
        except prometheus.UNREADABLE as error:
            return Reading(None, f"{metric.kind}: {prometheus.in_words(error, metric.timeout)}")

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession()
        return self._http


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
