"""The Kubernetes API over aiohttp: list, watch, server-side apply, delete.

A client library takes several times the memory and CPU time for a list, and the watches of the libraries that
were tried have neither timeouts nor bookmarks.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import aiohttp
import orjson

from nomad_watchdog.clients._kubernetes_credentials import Credential, Credentials
from nomad_watchdog.clients._kubernetes_errors import (
    ExpiredError,
    FieldConflictError,
    translate,
)
from nomad_watchdog.clients._kubernetes_settings import KubernetesAccess
from nomad_watchdog.clients.kubernetes_objects import KubernetesObject, ObjectMeta
from nomad_watchdog.clock import Clock, SystemClock
from nomad_watchdog.errors import NotFoundError, StaleError, TransientError, UserError
from nomad_watchdog.fast_json import as_json

__all__ = [
    "MANAGER",
    "ExpiredError",
    "FieldConflictError",
    "KubernetesAccess",
    "KubernetesClient",
    "Listed",
    "WatchEvent",
]

MANAGER: Final = "nomad-watchdog"
"""Name of this project as a field manager."""
PAGE: Final = 500
"""Page size of lists, the same as kubectl's. Larger pages occupy the server's memory longer."""
SILENCE_S: Final = 90.0
"""Timeout of a watch without any event. The server sends a bookmark about once per minute."""
_WATCH_S: Final = (240.0, 300.0)
"""Range of the duration of a watch in seconds. It is random, so that watches do not restart together."""
_CONNECT_S: Final = 3.0
_MAX_CONNECTIONS: Final = 32
_RELISTS: Final = 3
_LINE: Final = 8 * 1024 * 1024
"""Maximum length of a line of a watch. An object in etcd has at most 1.5 MiB, and is larger as JSON."""

_JSON: Final = "application/json"
_METADATA: Final = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_METADATA_LIST: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


@dataclass(frozen=True, slots=True)
class Listed:
    """A complete list at one version of the store."""

    items: tuple[KubernetesObject, ...]
    version: str


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One event of a watch. `kind`: ADDED, MODIFIED, DELETED or BOOKMARK (which has only a version)."""

    kind: str
    object: KubernetesObject

    @property
    def version(self) -> str:
        meta: ObjectMeta = self.object.get("metadata") or {}
        return meta.get("resourceVersion", "")


class KubernetesClient:
    """Every call has a timeout. Methods raise only the errors of `nomad_watchdog.errors`."""

    def __init__(self, settings: KubernetesAccess, clock: Clock | None = None) -> None:
        self.settings = settings
        self._credentials = Credentials(settings, clock or SystemClock())
        self._http: aiohttp.ClientSession | None = None
        self._watch_http: aiohttp.ClientSession | None = None
        self._tls_of = Credential()
        self._tls: ssl.SSLContext | bool = True
        if settings.server.startswith("https"):
            self._tls = settings.ssl_context()

    async def close(self) -> None:
        for session in (self._http, self._watch_http):
            if session is not None:
                await session.close()
        self._http = self._watch_http = None

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Raises NotFoundError when there is no such object."""
        return await self.call("GET", path, params=params)

    async def find(self, path: str, *, metadata: bool = False) -> KubernetesObject | None:
        """None when it does not exist. `metadata`: return only its metadata."""
        try:
            found = await self.call("GET", path, accept=_METADATA if metadata else _JSON)
        except NotFoundError:
            return None
        return cast("KubernetesObject", found)

    async def version_of(self, path: str) -> str:
        """The current version of the store, at which a watch of this list can begin."""
        found = await self.call("GET", path, params={"limit": "1"}, accept=_METADATA_LIST)
        return str((found.get("metadata") or {}).get("resourceVersion", ""))

    async def list(
        self, path: str, *, labels: str = "", fields: str = "", metadata: bool = False
    ) -> Listed:
        """All pages, consistent with each other and not older than any write before the call.
        `metadata`: return only the metadata of each object, a third of the bytes of a Deployment.

        Raises StaleError instead of returning an incomplete list."""
        for _ in range(_RELISTS):
            try:
                return await self._pages(
                    path, _selectors(labels, fields), _METADATA_LIST if metadata else _JSON
                )
            except ExpiredError:
                continue  # the pages took longer than the server keeps the version: start again
        raise StaleError(f"kubernetes: the list of {path} expires before all of it is read")

    async def _pages(self, path: str, selectors: Mapping[str, str], accept: str) -> Listed:
        items: list[KubernetesObject] = []
        async for page in self.pages(path, {"limit": str(PAGE), **selectors}, accept):
            items.extend(page.items)
        return Listed(tuple(items), page.version)

    async def pages(
        self, path: str, params: Mapping[str, str], accept: str = _JSON
    ) -> AsyncIterator[Listed]:
        """Page after page of a list, for a caller that may need only the first ones; always at least one.

        Raises ExpiredError when the server no longer has the version of the first page."""
        asked = dict(params)
        while True:
            page = await self.call("GET", path, params=asked, accept=accept)
            meta = page.get("metadata") or {}
            yield Listed(tuple(page.get("items") or ()), str(meta.get("resourceVersion", "")))
            if not meta.get("continue"):
                return
            asked["continue"] = meta["continue"]

    async def watch(
        self,
        path: str,
        version: str,
        *,
        labels: str = "",
        fields: str = "",
        metadata: bool = False,
        length_s: float | None = None,
    ) -> AsyncIterator[WatchEvent]:
        """Events after `version`, including bookmarks, until the server ends the watch after `length_s` seconds
        (by default a few minutes). Then watch again from the version of the last event.

        Raises ExpiredError when the server no longer has `version` (list again), TransientError when the connection
        breaks or no bookmark arrives in time."""
        length_s = length_s or random.uniform(*_WATCH_S)  # noqa: S311  # jitter
        params = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, int(length_s))),
            **_selectors(labels, fields),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=SILENCE_S)
        try:
            accept = _METADATA if metadata else _JSON
            async with self._answer(
                "GET", path, params=params, timeout=timeout, accept=accept
            ) as answer:
                if answer.status != 200:
                    raise translate(answer.status, await answer.read(), f"watch {path}")
                async for line in _lines(answer.content):
                    yield _event(line, path)
        except (
            aiohttp.ClientError, ValueError, LookupError, TypeError, AttributeError, OSError,
        ) as error:  # fmt: skip
            kind = type(error).__name__
            raise TransientError(f"kubernetes: the watch of {path} broke: {kind}") from error

    async def apply(
        self, path: str, body: Mapping[str, object], *, manager: str = MANAGER, force: bool = False
    ) -> KubernetesObject:
        """Server-side apply: create the object, or set its fields that are in the body and no others.

        With ``metadata.resourceVersion`` in the body it is a compare-and-set. Raises FieldConflictError when
        another manager owns one of these fields, ConflictError when the version differs."""
        params = {"fieldManager": manager, "force": "true" if force else "false"}
        applied = await self.call(
            "PATCH", path, params=params, body=body, content="application/apply-patch+yaml"
        )
        return cast("KubernetesObject", applied)

    async def create(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """Raises ConflictError when it exists."""
        return await self.call("POST", path, params={"fieldManager": MANAGER}, body=body)

    async def delete(
        self,
        path: str,
        *,
        grace_s: float | None = None,
        uid: str = "",
        version: str = "",
        propagation: str = "",
    ) -> bool:
        """Whether it existed. `uid` and `version`: delete only an object with these; else ConflictError."""
        options: dict[str, object] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if grace_s is not None:
            options["gracePeriodSeconds"] = max(0, round(grace_s))
        if propagation:
            options["propagationPolicy"] = propagation
        if conditions := {k: v for k, v in (("uid", uid), ("resourceVersion", version)) if v}:
            options["preconditions"] = conditions
        try:
            await self.call("DELETE", path, body=options)
        except NotFoundError:
            return False
        return True

    async def text(self, path: str, params: Mapping[str, str] | None = None) -> str:
        """A response that is not JSON, such as a log."""
        raw = await self._fetch("GET", path, params or {}, None, "", "*/*")
        return raw.decode(errors="replace")

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, object] | None = None,
        content: str = "application/json",
        accept: str = "application/json",
    ) -> dict[str, Any]:
        """One call with a JSON object as its response."""
        # not escaped to ASCII: the server parses an apply as YAML, which has no escaped surrogate pairs
        data = None if body is None else as_json(body)
        raw = await self._fetch(method, path, params or {}, data, content, accept)
        try:
            found = orjson.loads(raw)
        except ValueError as error:
            raise TransientError(
                f"kubernetes: the response to {path} is not complete JSON"
            ) from error
        if not isinstance(found, dict):
            raise TransientError(f"kubernetes: the response to {path} is not an object")
        return found

    async def _fetch(  # the parts of one request
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        data: bytes | None,
        content: str,
        accept: str,
    ) -> bytes:
        timeout = aiohttp.ClientTimeout(
            total=2 * self.settings.timeout_s,
            sock_connect=_CONNECT_S,
            sock_read=self.settings.timeout_s,
        )
        try:
            async with self._answer(
                method,
                path,
                params=params,
                data=data,
                content=content,
                accept=accept,
                timeout=timeout,
            ) as answer:
                raw = await answer.read()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            kind = type(error).__name__
            raise TransientError(
                f"kubernetes at {self.settings.server} does not answer: {kind}"
            ) from error
        if not 200 <= answer.status < 300:
            after = answer.headers.get("Retry-After", "")
            raise translate(answer.status, raw, f"{method} {path}", after)
        return raw

    @asynccontextmanager
    async def _answer(  # the parts of one request
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  # aiohttp's own, for one request
        data: bytes | None = None,
        content: str = "",
        accept: str = _JSON,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response. After a refusal (401) the call is repeated once if there is a new credential."""
        async with AsyncExitStack() as stack:
            for attempt in range(2):
                who = await self._credentials.current()
                headers = {"Accept": accept}
                if who.token:
                    headers["Authorization"] = f"Bearer {who.token}"
                if data is not None:
                    headers["Content-Type"] = content
                session = self._watch_session() if "watch" in params else self._session()
                answer = await stack.enter_async_context(
                    session.request(
                        method,
                        f"{self.settings.server}{path}",
                        params=params,
                        data=data,
                        headers=headers,
                        ssl=await self._context(who),
                        server_hostname=self.settings.tls_server_name or None,
                        timeout=timeout,
                        allow_redirects=False,
                    )
                )
                if answer.status != 401 or attempt or not await self._credentials.refused(who):
                    break
                await stack.aclose()
            yield answer

    async def _context(self, who: Credential) -> ssl.SSLContext | bool:
        if who.cert and who != self._tls_of and self._tls is not True:
            self._tls = await asyncio.to_thread(self.settings.ssl_context, who.cert, who.key)
            self._tls_of = who
        return self._tls

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._http

    def _watch_session(self) -> aiohttp.ClientSession:
        """A separate session: each watch occupies a connection, three per namespace, and calls need some as well."""
        if self._watch_http is None:
            self._watch_http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._watch_http


def _selectors(labels: str, fields: str) -> dict[str, str]:
    return {k: v for k, v in (("labelSelector", labels), ("fieldSelector", fields)) if v}


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a watch. aiohttp's own reader limits lines to 64 KiB."""
    rest = b""
    async for chunk in stream.iter_any():
        *whole, rest = (rest + chunk).split(b"\n") if b"\n" in chunk else (rest + chunk,)
        for line in whole:
            yield line
        if len(rest) > _LINE:
            raise ValueError("a line of the watch is too long")


def _event(line: bytes, path: str) -> WatchEvent:
    found = orjson.loads(line)
    kind, thing = found["type"], found["object"]
    meta = thing.get("metadata", {})
    if not isinstance(meta, dict) or not isinstance(labels := meta.get("labels") or {}, dict):
        raise TypeError("an object's metadata or its labels are not an object")
    if not all(isinstance(one, str) for one in labels.values()):
        raise TypeError("an object's label is not text")
    if kind == "ERROR":
        raise translate(int(thing.get("code") or 500), as_json(thing), f"watch {path}")
    if kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK"):
        raise UserError(f"kubernetes: the watch of {path} sent an unknown event {kind[:40]!r}")
    return WatchEvent(kind, thing)
