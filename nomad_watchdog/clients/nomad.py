"""Nomad over HTTP.

The library python-nomad serves rare calls (`_nomad_library.py`). Dispatches, stops, lists and the event stream use
aiohttp, which needs no thread and less CPU time per call. The library also sends the idempotency token under a key
that Nomad ignores, cannot read lists in pages, and does not notice when its event stream ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote

import aiohttp
import orjson
from watchdog_agent.runtime.parsing import whole

from nomad_watchdog.clients._nomad_library import CONNECT_S, NoAnswerError, NomadLibrary
from nomad_watchdog.clients._nomad_settings import (
    NOT_KNOWN,
    NomadAccess,
    is_unknown_token,
    translate,
)
from nomad_watchdog.clients.nomad_features import (
    PROBE,
    Feature,
    NomadFeatures,
    of_members,
    of_parsed,
)
from nomad_watchdog.clients.nomad_rows import Frame, Job
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    StaleError,
    TransientError,
    UserError,
)
from nomad_watchdog.fast_json import as_json

__all__ = [
    "NOT_KNOWN",
    "OWN_TOKEN",
    "Answer",
    "NomadAccess",
    "NomadClient",
    "is_unknown_token",
    "translate",
]

OWN_TOKEN: Final = "/v1/acl/token/self"  # noqa: S105  # a path
"""The only read that distinguishes an unknown token from one without rights, and that every token may use."""
_EXPLAIN_EVERY_S: Final = 10.0
"""Minimum interval between two reads of it, because a fleet without rights is denied often."""

_T = TypeVar("_T")
_MAX_CONNECTIONS: Final = 20
"""With 4 threads of the library 24 connections. Nomad refuses the 101st connection of an address with 429."""
SILENCE_S: Final = 45.0
"""Timeout of the event stream without data. Nomad sends a heartbeat every 30 s."""
PER_PAGE: Final = 2000
_MAX_PAGES: Final = 200
_BY_INDEX: Final = frozenset({"/v1/allocations", "/v1/evaluations"})
"""Lists whose pages begin at a create index. Older servers compare it as text, so that past a power of ten the pages
start again and never end."""
_STREAM_LINE: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """The parsed body of a response, and the index of Nomad's table that it reflects."""

    body: Any
    index: int


_PACKED: Final[Mapping[str, str]] = {}
_PLAIN: Final[Mapping[str, str]] = {"Accept-Encoding": "identity"}
"""Gzip reduces lists to a twentieth. Compressing a response to a dispatch or a frame of events costs the server more
than sending it."""


class NomadClient:
    """At most 24 connections. Every call has a timeout. Methods raise only the errors of `nomad_watchdog.errors`."""

    def __init__(self, settings: NomadAccess) -> None:
        settings.check()
        self.settings = settings
        self._base = settings.address.rstrip("/")
        self._context = settings.ssl_context()
        self._token = settings.token
        self._token_read = False
        self._http: aiohttp.ClientSession | None = None
        self._features: NomadFeatures | None = None
        self._library = NomadLibrary(settings, self._context)
        self._set_token(self._token)
        self._explained_at = float("-inf")
        self._token_unknown = False

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None
        self._library.close()

    async def features(self, *, again: bool = False) -> NomadFeatures:
        """The features of the servers; read once. `again`: read them again, as the servers may have been upgraded.

        With the right `node { policy = "read" }` the exact version is known, otherwise a lower bound."""
        if self._features is None or again:
            found = None
            with contextlib.suppress(DeniedError):
                found = of_members((await self.get("/v1/agent/members", "node:read")).body)
            self._features = found or of_parsed(await self.parse(PROBE, ""))
        return self._features

    # rare calls, through the library

    async def parse(self, text: str, variables: str) -> Job:
        """A template's text as a job, by Nomad's own parser. Raises UserError with its message, also when the parser
        crashes without a response (as in Nomad 1.6 for a duration that is null)."""

        def post() -> object:
            return self._library.parse(text, variables)

        try:
            job = await self._call("parse-job", post)
        except NoAnswerError:
            await self.get("/v1/status/leader", "none")  # raises when Nomad itself does not answer
            try:
                job = await self._call("parse-job", post)
            except NoAnswerError as error:
                raise UserError(
                    "nomad's parser crashes on the template: no duration may be null or empty"
                ) from error
        if not isinstance(job, dict):
            raise UserError("nomad's parser returned no job for the template")
        return cast("Job", job)

    async def validate(self, job: Job) -> None:
        """Raises UserError with Nomad's message."""
        answer = await self._call("read-job", lambda: self._library.validate(job))
        if answer.get("Error") or answer.get("ValidationErrors"):
            message = answer.get("Error") or "; ".join(answer["ValidationErrors"])
            raise UserError(f"nomad refuses the template: {' '.join(message.split())[:600]}")

    async def register(self, job: Job, *, enforce: int | None = None) -> int:
        """The index of the registration. `enforce`: the expected modify index of the job, 0 = it must not exist.
        Raises ConflictError if it differs."""
        body: dict[str, object] = {"Job": job}
        if enforce is not None:
            body |= {"EnforceIndex": True, "JobModifyIndex": enforce}
        return await self._call("submit-job", lambda: self._library.register(body))

    async def job(self, job_id: str) -> Job | None:
        """None when it does not exist."""
        try:
            return await self._call("read-job", lambda: self._library.job(job_id))
        except NotFoundError:
            return None

    async def _call(self, capability: str, function: Callable[[], _T]) -> _T:
        await self._read_token(again=False)
        try:
            return await self._library.run(capability, function)
        except DeniedError as error:
            if not await self._read_token(again=True):
                raise await self._explained(error) from error
        return await self._library.run(capability, function)

    async def _explained(self, error: Exception) -> Exception:
        """The error, or one for an unknown token: most responses of Nomad do not distinguish these."""
        if not isinstance(error, DeniedError) or not self._token:
            return error
        now = time.monotonic()
        if now - self._explained_at > _EXPLAIN_EVERY_S:
            self._explained_at, self._token_unknown = now, False
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with self._open().get(
                    f"{self._base}{OWN_TOKEN}",
                    headers=self._headers(),
                    server_hostname=self.settings.tls_server_name or None,
                ) as answer:
                    text = (await answer.read()).decode(errors="replace")
                    self._token_unknown = answer.status != 200 and is_unknown_token(text)
        return DeniedError(NOT_KNOWN) if self._token_unknown else error

    # frequent calls, over aiohttp

    async def dispatch(self, parent: str, body: Mapping[str, Any]) -> Answer:
        """The answer is only a hint: after a lost race the job of its id may not exist."""
        path = f"/v1/job/{quote(parent, safe='')}/dispatch"
        answer = await self._request("POST", path, "dispatch-job", body=body)
        return Answer(answer.body, int(answer.body["Index"]))

    async def deregister(self, job_id: str, *, purge: bool = False) -> None:
        """Stop a job. For a job that does not exist Nomad answers 200. This call is frequent: when ten thousand
        devices leave at once there are as many stops (L4; `bench/storm.py`)."""
        path = f"/v1/job/{quote(job_id, safe='')}"
        params = {"purge": "true"} if purge else {}
        await self._request("DELETE", path, "submit-job", params=params)

    async def evaluate(self, job_id: str) -> None:
        """Have the scheduler evaluate a job. Has no effect if that has been done."""
        path = f"/v1/job/{quote(job_id, safe='')}/evaluate"
        await self._request("POST", path, "submit-job", body={"JobID": job_id})

    async def scale(self, job_id: str, group: str, count: int, message: str) -> None:
        """Raises UserError for a count outside of the group's `scaling` block, ConflictError during a deployment of the
        job (Nomad 1.11 does not scale a job then)."""
        path = f"/v1/job/{quote(job_id, safe='')}/scale"
        body = {"Count": count, "Target": {"Group": group}, "Message": message[:256]}
        try:
            await self._request("POST", path, "scale-job", body=body)
        except UserError as error:
            if "active deployment" in str(error):
                raise ConflictError(str(error)) from error
            raise

    async def get(
        self, path: str, capability: str, params: Mapping[str, str] | None = None
    ) -> Answer:
        return await self._request("GET", path, capability, params=params)

    async def pages(self, path: str, capability: str, params: Mapping[str, str]) -> Answer:
        """A whole list; the index is the lowest of its pages.

        Raises StaleError instead of returning an incomplete list."""
        if path in _BY_INDEX and not (await self.features()).has(Feature.NUMERIC_PAGES):
            whole = await self.get(path, capability, params)
            return Answer(whole.body or [], whole.index)
        rows: list[Any] = []
        least = 0
        page_params = {**params, "per_page": str(PER_PAGE)}
        for _ in range(_MAX_PAGES):
            answer, following = await self._page(path, capability, page_params)
            rows.extend(answer.body or [])
            least = min(least, answer.index) if least else answer.index
            if not following:
                return Answer(rows, least)
            page_params["next_token"] = following
        raise StaleError(f"nomad lists more than {_MAX_PAGES * PER_PAGE} entries of {path}")

    async def events(self, params: list[tuple[str, str]]) -> AsyncIterator[list[Frame]]:
        """Frames of the event stream, all that have arrived at a time; ``{}`` is a heartbeat. Raises TransientError when
        the connection ends, has no data for 45 s, or sends something else (such as an empty line)."""
        await self._read_token(again=False)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        try:
            async with self._open().get(
                f"{self._base}/v1/event/stream",
                params=[*params, *self._params({}).items()],
                headers=self._headers() | dict(_PLAIN),
                timeout=timeout,
                server_hostname=self.settings.tls_server_name or None,
            ) as answer:
                if answer.status != 200:
                    raise translate(answer.status, await answer.text(), "read-job")
                async for frames in _frames(answer.content):
                    yield frames
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            kind = type(error).__name__
            raise TransientError(f"the event stream of nomad failed: {kind}") from error

    async def _page(
        self, path: str, capability: str, params: Mapping[str, str]
    ) -> tuple[Answer, str]:
        found: list[str] = []
        answer = await self._request("GET", path, capability, params=params, next_token=found)
        return answer, found[0] if found else ""

    async def _request(
        self,
        method: str,
        path: str,
        capability: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        next_token: list[str] | None = None,
    ) -> Answer:
        raw, headers = await self._fetch(method, path, capability, params=params, body=body)
        if next_token is not None and headers.get("X-Nomad-NextToken"):
            next_token.append(headers["X-Nomad-NextToken"])
        try:
            return Answer(orjson.loads(raw), whole(headers.get("X-Nomad-Index", "0")))
        except ValueError as error:
            raise TransientError(f"nomad's answer to {path} is not complete JSON") from error

    async def text(self, path: str, capability: str, params: Mapping[str, str]) -> str:
        """A response that is not JSON, such as a log."""
        raw, _ = await self._fetch("GET", path, capability, params=params, body=None)
        return raw.decode(errors="replace")

    async def _fetch(
        self,
        method: str,
        path: str,
        capability: str,
        *,
        params: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
    ) -> tuple[bytes, Mapping[str, str]]:
        await self._read_token(again=False)
        form = _PACKED if method == "GET" else _PLAIN
        if body is not None:
            form = {**form, "Content-Type": "application/json"}
        data = None if body is None else as_json(body)
        for attempt in range(2):
            sent = {**self._headers(), **form}
            try:
                async with self._open().request(
                    method,
                    f"{self._base}{path}",
                    params=self._params(params or {}),
                    data=data,
                    headers=sent,
                    server_hostname=self.settings.tls_server_name or None,
                ) as answer:
                    raw = await answer.read()
                    headers = answer.headers
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                kind = type(error).__name__
                raise TransientError(f"nomad at {self._base} does not answer: {kind}") from error
            if answer.status == 403 and attempt == 0 and await self._read_token(again=True):
                continue
            if answer.status != 200:
                text = raw.decode(errors="replace")
                after = headers.get("Retry-After", "")
                raise await self._explained(translate(answer.status, text, capability, after))
            return raw, headers
        raise AssertionError("unreachable")

    def _open(self) -> aiohttp.ClientSession:
        if self._http is None:
            tls: ssl.SSLContext | bool = True if self._context is None else self._context
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS, ssl=tls),
                timeout=aiohttp.ClientTimeout(
                    total=2 * self.settings.timeout_s,
                    sock_connect=CONNECT_S,
                    sock_read=self.settings.timeout_s,
                ),
            )
        return self._http

    def _params(self, params: Mapping[str, str]) -> dict[str, str]:
        region = {"region": self.settings.region} if self.settings.region else {}
        return {"namespace": self.settings.namespace, **region, **params}

    def _headers(self) -> dict[str, str]:
        return {"X-Nomad-Token": self._token} if self._token else {}

    def _set_token(self, token: str) -> None:
        self._token = token
        self._library.set_token(token)

    async def _read_token(self, *, again: bool) -> bool:
        """Whether the file contains another token than before."""
        if not self.settings.token_file or (self._token_read and not again):
            return False
        token = await asyncio.to_thread(self.settings.read_token)
        self._token_read = True
        changed = token != self._token
        self._set_token(token)
        return changed


async def _frames(stream: aiohttp.StreamReader) -> AsyncIterator[list[Frame]]:
    """Newline-delimited JSON. A frame may exceed aiohttp's limit of a line, so lines are split here."""
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _STREAM_LINE:
            raise ValueError("a frame is too long")
        frames = [
            orjson.loads(line) for line in lines
        ]  # an empty line, sent on errors, is not JSON
        if not all(isinstance(frame, dict) for frame in frames):
            raise ValueError("a frame is not an object")
        if frames:
            yield frames
    raise TransientError("nomad closed the event stream")
