"""The number that a query of Prometheus returns, and JSON of other servers that the configuration names."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self, TypedDict, cast

import aiohttp
import orjson
from watchdog_agent.runtime.parsing import finite

from nomad_watchdog import text_files
from nomad_watchdog.core.rollout_analysis import Analysis, QueryValue
from nomad_watchdog.errors import WatchdogError

MAX_BYTES: Final = 8 * 1024 * 1024
UNREADABLE: Final = (
    WatchdogError,
    ValueError,
    LookupError,
    TypeError,
    OSError,
    aiohttp.ClientError,
)
"""What reading raises."""


@dataclass(frozen=True, slots=True)
class Source:
    """An address that is read."""

    url: str
    token_file: str = ""
    timeout_s: float = 5.0


async def read_json(
    http: aiohttp.ClientSession, source: Source, params: Mapping[str, str] | None = None
) -> object:
    """The JSON at an address. Raises the errors of UNREADABLE."""
    headers = {}
    if source.token_file:
        token = await asyncio.to_thread(text_files.token, "token_file", source.token_file)
        headers["Authorization"] = f"Bearer {token}"
    timeout = aiohttp.ClientTimeout(total=source.timeout_s)
    async with http.get(
        source.url, params=params, headers=headers, timeout=timeout, allow_redirects=False
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


async def query(http: aiohttp.ClientSession, source: Source, expression: str) -> float:
    """The value of an instant query. `source.url`: of Prometheus. Raises the errors of UNREADABLE."""
    address = f"{source.url.rstrip('/')}/api/v1/query"
    page = Source(address, source.token_file, source.timeout_s)
    return sample(await read_json(http, page, {"query": expression}))


def in_words(error: BaseException, timeout_s: float) -> str:
    """An error of UNREADABLE, in at most 200 characters."""
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"the name {error.host} can't be resolved"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection to {error.host}:{error.port}"
    return (str(error) or type(error).__name__)[:200]


class RolloutQueries:
    """Reads the queries of roll-outs: ``async with RolloutQueries() as queries: … await queries.read(…)``."""

    def __init__(self) -> None:
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()

    async def read(self, of: Analysis) -> QueryValue:
        """The current value. Errors are returned in words, not raised."""
        if self._http is None:
            self._http = aiohttp.ClientSession()
        source = Source(of.url, of.token_file, of.timeout_s)
        try:
            return QueryValue(await query(self._http, source, of.query))
        except UNREADABLE as error:
            return QueryValue(None, in_words(error, of.timeout_s))


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


def sample(response: object) -> float:
    """The number in Prometheus's response, which must be a scalar or one series. Raises ValueError."""
    try:
        answer = cast("_QueryResponse", response)
        if answer["status"] != "success":
            raise ValueError(f"prometheus reports: {answer.get('error', 'an unknown error')}")
        kind, result = answer["data"]["resultType"], answer["data"]["result"]
        if kind == "scalar":
            return _finite(result[1])
        if kind != "vector":
            raise ValueError(f"it returns a {kind}; expected one number")
        if len(result) != 1:
            raise ValueError(f"it returns {len(result)} series; expected 1: aggregate them")
        return _finite(cast("_Series", result[0])["value"][1])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("the answer is not from Prometheus") from error


def _finite(value: object) -> float:
    try:
        return finite(cast("str", value))
    except (ValueError, TypeError):
        raise ValueError(f"it returns {ascii(value)[:40].lower()}") from None
