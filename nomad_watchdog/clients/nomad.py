"""Nomad over HTTP: the only module that imports `nomad` (the package python-nomad).

The library serves what is rare (parse, validate, register, read), in threads, over a session of our own.
Dispatches, stops, lists and the event stream go over aiohttp, which takes no thread and less
of the processor a call. python-nomad also sends the idempotency token under a key that Nomad ignores,
cannot page, and its event stream dies silently.
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
import nomad  # type: ignore[import-untyped]  # python-nomad ships no types
import nomad.api.exceptions  # type: ignore[import-untyped]
import orjson
import requests
import requests.adapters
from watchdog_agent.runtime.parsing import whole

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
"""The only read that tells an unknown token from one without rights, and that every token may do."""
_EXPLAIN_EVERY_S: Final = 10.0
"""Between two reads of it: a fleet without rights is denied often."""

_T = TypeVar("_T")
_MAX_CONNECTIONS: Final = 20
_MAX_THREADS: Final = 4
"""Together 24; Nomad refuses a client address its 101st connection with 429."""
_CONNECT_S: Final = 2.0
SILENCE_S: Final = 45.0
"""The event stream says something every 30 s at least."""
PER_PAGE: Final = 2000
_MAX_PAGES: Final = 200
_BY_INDEX: Final = frozenset({"/v1/allocations", "/v1/evaluations"})
"""Lists whose pages begin at a create index, which older servers compare as text: there the pages begin
anew past a power of ten and never end."""
_STREAM_LINE: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """The parsed body of a read, and the index of Nomad's table that it is good for."""

    body: Any
    index: int


class _NoAnswerError(TransientError):
    """The connection failed or was closed before an answer came."""


class _Adapter(requests.adapters.HTTPAdapter):
    """requests with our TLS context (server name included) and as many connections as threads."""

    def __init__(self, context: ssl.SSLContext | None, server_name: str) -> None:
        self._context = context
        self._server_name = server_name
        super().__init__(pool_maxsize=_MAX_THREADS, pool_block=True)

    def init_poolmanager(self, *args: Any, **keywords: Any) -> None:
        if self._context is not None:
            keywords["ssl_context"] = self._context
        if self._server_name:
            keywords["server_hostname"] = self._server_name
            keywords["assert_hostname"] = self._server_name
        super().init_poolmanager(*args, **keywords)

    def cert_verify(self, *args: Any, **keywords: Any) -> None:
        """Our context knows whom it trusts; requests would add the authorities of its own bundle."""
        if self._context is None:
            super().cert_verify(*args, **keywords)  # type: ignore[no-untyped-call]  # requests


_PACKED: Final[Mapping[str, str]] = {}
_PLAIN: Final[Mapping[str, str]] = {"Accept-Encoding": "identity"}
"""Lists shrink to a twentieth by gzip; an answer to a dispatch or a frame of events costs the server more
to pack than to send."""


class NomadClient:
    """At most 24 connections; every call has a time-out and raises only our errors."""

    def __init__(self, settings: NomadAccess) -> None:
        settings.check()
        self.settings = settings
        self._base = settings.address.rstrip("/")
        self._context = settings.ssl_context()
        self._token = settings.token
        self._token_read = False
        self._http: aiohttp.ClientSession | None = None
        self._threads = asyncio.Semaphore(_MAX_THREADS)
        self._features: NomadFeatures | None = None
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy or a bundle of the environment is not meant
        self._session.mount(self._base, _Adapter(self._context, settings.tls_server_name))
        library = nomad.Nomad(
            address=self._base,
            namespace=settings.namespace,
            timeout=(_CONNECT_S, settings.timeout_s),
            verify=not settings.tls_skip_verify,
            session=self._session,
        )
        self._jobs, self._job, self._validate = library.jobs, library.job, library.validate
        for endpoint in (self._jobs, self._job, self._validate):
            # the library takes what is empty from the environment; ours is explicit
            endpoint.region = settings.region or None
            endpoint.cert = (
                (settings.client_cert, settings.client_key) if settings.client_cert else ()
            )
        self._set_token(self._token)
        self._explained_at = float("-inf")
        self._token_unknown = False

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None
        self._session.close()

    async def features(self, *, again: bool = False) -> NomadFeatures:
        """What the servers can do; read once, and `again` when they may have been upgraded.

        The right `node { policy = "read" }` gives the exact version. Without it a lower bound is used."""
        if self._features is None or again:
            found = None
            with contextlib.suppress(DeniedError):
                found = of_members((await self.get("/v1/agent/members", "node:read")).body)
            self._features = found or of_parsed(await self.parse(PROBE, ""))
        return self._features

    # what is rare, through the library

    async def parse(self, text: str, variables: str) -> Job:
        """A template's text as a job, by Nomad's own parser. Raises UserError with its complaint, also when
        the parser crashes and answers nothing (Nomad 1.6 does for a duration that is null)."""
        body = {"JobHCL": text, "Variables": variables, "Canonicalize": False}

        def post() -> object:
            return self._jobs.request("parse", json=body, method="post").json()

        try:
            job = await self._call("parse-job", post)
        except _NoAnswerError:
            await self.get("/v1/status/leader", "none")  # raises where Nomad itself is away
            try:
                job = await self._call("parse-job", post)
            except _NoAnswerError as error:
                raise UserError(
                    "nomad's parser crashes on the template: no duration may be null or empty"
                ) from error
        if not isinstance(job, dict):
            raise UserError("nomad parsed no job from the template")
        return cast("Job", job)

    async def validate(self, job: Job) -> None:
        """Raises UserError with Nomad's complaint."""
        body = {"Job": job}
        answer = await self._call("read-job", lambda: self._validate.validate_job(body).json())
        if answer.get("Error") or answer.get("ValidationErrors"):
            said = answer.get("Error") or "; ".join(answer["ValidationErrors"])
            raise UserError(f"nomad refuses the template: {' '.join(said.split())[:600]}")

    async def register(self, job: Job, *, enforce: int | None = None) -> int:
        """The index of the registration. `enforce`: the job's modify index now, 0 = it must not
        exist; else ConflictError."""
        body: dict[str, Any] = {"Job": job}
        if enforce is not None:
            body |= {"EnforceIndex": True, "JobModifyIndex": enforce}
        answer = await self._call(
            "submit-job", lambda: self._jobs.request(json=body, method="post").json()
        )
        return int(answer["JobModifyIndex"])

    async def job(self, job_id: str) -> Job | None:
        """None when there is none."""
        try:
            found: Job = await self._call(
                "read-job", lambda: self._job.get_job(quote(job_id, safe=""))
            )
        except NotFoundError:
            return None
        return found

    async def _call(self, capability: str, function: Callable[[], _T]) -> _T:
        await self._read_token(again=False)
        try:
            return await self._in_thread(capability, function)
        except DeniedError as error:
            if not await self._read_token(again=True):
                raise await self._explained(error) from error
        return await self._in_thread(capability, function)

    async def _explained(self, error: Exception) -> Exception:
        """A denial, or that Nomad does not know our token: most of its answers are the same for both."""
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
                    said = (await answer.read()).decode(errors="replace")
                    self._token_unknown = answer.status != 200 and is_unknown_token(said)
        return DeniedError(NOT_KNOWN) if self._token_unknown else error

    async def _in_thread(self, capability: str, function: Callable[[], _T]) -> _T:
        async with self._threads:
            try:
                return await asyncio.to_thread(function)
            except nomad.api.exceptions.BaseNomadException as error:
                response = error.nomad_resp
                if isinstance(response, requests.Response):
                    after = response.headers.get("Retry-After", "")
                    found = translate(response.status_code, response.text, capability, after)
                    raise found from error
                kind = type(response).__name__
                raise _NoAnswerError(f"nomad at {self._base} does not answer: {kind}") from error
            except (requests.RequestException, ValueError) as error:
                kind = type(error).__name__
                raise _NoAnswerError(f"nomad at {self._base} does not answer: {kind}") from error

    # the hot path, over aiohttp

    async def dispatch(self, parent: str, body: Mapping[str, Any]) -> Answer:
        """The answer is a hint: the job id in it may not exist (a phantom of a lost race)."""
        path = f"/v1/job/{quote(parent, safe='')}/dispatch"
        answer = await self._request("POST", path, "dispatch-job", body=body)
        return Answer(answer.body, int(answer.body["Index"]))

    async def deregister(self, job_id: str, *, purge: bool = False) -> None:
        """A job that does not exist is deregistered already: Nomad answers 200. On the hot path too: ten
        thousand devices that vanish at once are as many stops (L4; `bench/storm.py`)."""
        path = f"/v1/job/{quote(job_id, safe='')}"
        params = {"purge": "true"} if purge else {}
        await self._request("DELETE", path, "submit-job", params=params)

    async def evaluate(self, job_id: str) -> None:
        """Have the scheduler evaluate a job. Has no effect where it has done so already."""
        path = f"/v1/job/{quote(job_id, safe='')}/evaluate"
        await self._request("POST", path, "submit-job", body={"JobID": job_id})

    async def scale(self, job_id: str, group: str, count: int, message: str) -> None:
        """Raises UserError for a count outside of the group's `scaling` block, ConflictError while a
        deployment of the job is under way (Nomad 1.11 scales no job then)."""
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
        """A whole list, however long; the index is the least of its pages'.

        Raises StaleError rather than give a part."""
        if path in _BY_INDEX and not (await self.features()).has(Feature.NUMERIC_PAGES):
            whole = await self.get(path, capability, params)
            return Answer(whole.body or [], whole.index)
        rows: list[Any] = []
        least = 0
        ask = {**params, "per_page": str(PER_PAGE)}
        for _ in range(_MAX_PAGES):
            answer, following = await self._page(path, capability, ask)
            rows.extend(answer.body or [])
            least = min(least, answer.index) if least else answer.index
            if not following:
                return Answer(rows, least)
            ask["next_token"] = following
        raise StaleError(f"nomad lists more than {_MAX_PAGES * PER_PAGE} entries of {path}")

    async def events(self, params: list[tuple[str, str]]) -> AsyncIterator[list[Frame]]:
        """Frames of the event stream, as many at a time as have come; ``{}`` is its heartbeat. Raises TransientError when the
        connection ends, is silent for 45 s, or sends what is no frame (an empty line, say)."""
        await self._read_token(again=False)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=SILENCE_S)
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
            raise TransientError(f"the event stream of nomad broke: {kind}") from error

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
            raise TransientError(f"nomad's answer to {path} is cut off or no JSON") from error

    async def text(self, path: str, capability: str, params: Mapping[str, str]) -> str:
        """An answer that is no JSON: a log, say."""
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
            asked = {**self._headers(), **form}
            try:
                async with self._open().request(
                    method,
                    f"{self._base}{path}",
                    params=self._params(params or {}),
                    data=data,
                    headers=asked,
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
                said = raw.decode(errors="replace")
                after = headers.get("Retry-After", "")
                raise await self._explained(translate(answer.status, said, capability, after))
            return raw, headers
        raise AssertionError("unreachable")

    def _open(self) -> aiohttp.ClientSession:
        if self._http is None:
            tls: ssl.SSLContext | bool = True if self._context is None else self._context
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS, ssl=tls),
                timeout=aiohttp.ClientTimeout(
                    total=2 * self.settings.timeout_s,
                    sock_connect=_CONNECT_S,
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
        for endpoint in (self._jobs, self._job, self._validate):
            endpoint.token = token or None

    async def _read_token(self, *, again: bool) -> bool:
        """Whether the file gave another token than before."""
        if not self.settings.token_file or (self._token_read and not again):
            return False
        token = await asyncio.to_thread(self.settings.read_token)
        self._token_read = True
        changed = token != self._token
        self._set_token(token)
        return changed


async def _frames(stream: aiohttp.StreamReader) -> AsyncIterator[list[Frame]]:
    """Newline-delimited JSON. A single frame may exceed aiohttp's line limit, so lines are cut here."""
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _STREAM_LINE:
            raise ValueError("a frame is too long")
        frames = [orjson.loads(line) for line in lines]  # an empty line, sent on errors, is no JSON
        if not all(isinstance(frame, dict) for frame in frames):
            raise ValueError("a frame is no object")
        if frames:
            yield frames
    raise TransientError("nomad closed the event stream")
