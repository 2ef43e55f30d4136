"""Consul over HTTP, with the library py-consul.

`_Http` adds below the library's API what it lacks: the token on every call, limits of connections and time, and the
check of the header that reports results hidden by ACLs.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import aiohttp
import consul.aio  # type: ignore[import-untyped]  # py-consul ships no types
import consul.base  # type: ignore[import-untyped]
import consul.exceptions  # type: ignore[import-untyped]
from watchdog_agent.runtime.parsing import loads, whole

from nomad_watchdog.clients._consul_rows import KvRow, TxnConflictError
from nomad_watchdog.clients._consul_settings import NOT_KNOWN, ConsulAccess, is_unknown_token
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    FencedError,
    TerminalError,
    TransientError,
    WatchdogError,
)

__all__ = [
    "NOT_KNOWN",
    "ConsulAccess",
    "ConsulClient",
    "KvRow",
    "TxnConflictError",
    "cas",
    "check_session",
    "delete_cas",
    "is_unknown_token",
    "put",
]

_T = TypeVar("_T")
_MAX_CONNECTIONS: Final = 16
"""Consul allows 200 connections per client address, which all agents of a host share. Pending watches count."""
MAX_WAIT_S: Final = 60.0
"""Maximum duration of a blocking query, and so of the delay after a missed change (a restored snapshot)."""


class _Http(consul.aio.HTTPClient):  # type: ignore[misc]  # untyped base
    """The library's HTTP layer with the token on all calls (the library omits it from transactions)."""

    def __init__(self, settings: ConsulAccess) -> None:
        scheme, host, port = settings.endpoint()
        consul.base.HTTPClient.__init__(self, host, port, scheme)
        self.base_uri = (
            settings.address
        )  # with the path of a reverse proxy, which the library omits
        self.settings = settings
        self.token = settings.read_token()
        self._session: aiohttp.ClientSession | None = None

    async def _request(
        self,
        callback: Callable[[Any], _T],
        method: str,
        uri: str,
        headers: dict[str, str] | None,
        data: str | bytes | None = None,
        **_: object,
    ) -> _T:
        if self._session is None:  # created here because it needs the running loop
            connector = aiohttp.TCPConnector(
                limit=_MAX_CONNECTIONS, ssl=self.settings.ssl_context() or True
            )
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.settings.timeout_s)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        sent = {k: v for k, v in (headers or {}).items() if k != "X-Consul-Token"}
        if self.token:
            sent["X-Consul-Token"] = self.token
        if self.settings.namespace:
            sent["X-Consul-Namespace"] = self.settings.namespace
        async with self._session.request(
            method,
            uri,
            headers=sent,
            data=data,
            server_hostname=self.settings.tls_server_name or None,
        ) as answer:
            body = await answer.text(encoding="utf-8")
            if answer.headers.get("X-Consul-Results-Filtered-By-ACLs") == "true":
                raise consul.exceptions.ACLPermissionDenied("results were filtered by ACLs")
            return callback(consul.base.Response(answer.status, answer.headers, body))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


class _Library(consul.base.Consul):  # type: ignore[misc]  # untyped base
    def __init__(self, http: _Http) -> None:
        self.own_http = http
        super().__init__(host=http.host, port=http.port)

    def http_connect(self, *_: object, **__: object) -> _Http:
        return self.own_http


class ConsulClient:
    """The calls of Consul that this project uses. It belongs to the event loop of its first call.

    All methods raise TransientError (no response in time, 429, 5xx), DeniedError (the message names the missing
    policy) and TerminalError (refused permanently). A cancelled call closes its connection.
    """

    def __init__(self, settings: ConsulAccess | None = None) -> None:
        self.settings = settings or ConsulAccess.from_env()
        self._http = _Http(self.settings)
        self.library = _Library(self._http)
        """Only for this package: no other package uses the library."""

    async def close(self) -> None:
        await self._http.close()

    async def kv_get(self, key: str) -> KvRow | None:
        """One key, read consistently; None when it does not exist (404)."""
        _, row = await self.call(
            lambda: self.library.kv.get(key, consistency="consistent"),
            what=f"read of key {key}",
            needs=f'key "{key}" {{ policy = "read" }}',
        )
        return None if row is None else _kv_row(row)

    async def kv_tree(
        self, prefix: str, index: int = 0, wait_s: float = 30.0
    ) -> tuple[int, list[KvRow]]:
        """All keys under prefix (ends with "/") and their index, read consistently.

        index > 0 waits, at most wait_s, until something changed after it; the result may be unchanged.
        """
        found, rows = await self._blocking(
            lambda **how: self.library.kv.get(
                prefix, recurse=True, consistency="consistent", **how
            ),
            index,
            wait_s,
            what=f"read of keys under {prefix}",
            needs=f'key_prefix "{prefix}" {{ policy = "read" }}',
        )
        return found, [_kv_row(row) for row in rows]

    async def kv_change(self, prefix: str, index: int, wait_s: float, *, beacon: str) -> int:
        """The index of all keys under prefix (ends with "/") as soon as it differs from `index`, the last one that was
        read; `index` itself after wait_s seconds. Only names of folders are transferred. 0 when the key `beacon`,
        directly under prefix, is not among the names: without rights Consul responds as if there were no keys.

        Restoring a snapshot ends a blocking query at once, with the index that was sent. The next query would wait
        for an index that only the lost history had, so after an early response the index is read without waiting.
        Measured on Consul 1.14.11 with a server and a client agent: 16 of 16 restored snapshots.
        """
        began = time.monotonic()
        found, names = await self._kv_names(prefix, index, wait_s)
        if found == index and time.monotonic() - began < wait_s:
            found, names = await self._kv_names(prefix, 0, 0.0)
        return found if beacon in names else 0

    async def _kv_names(self, prefix: str, index: int, wait_s: float) -> tuple[int, list[Any]]:
        return await self._blocking(
            lambda **how: self.library.kv.get(
                prefix, keys=True, separator="/", consistency="consistent", **how
            ),
            index,
            wait_s,
            what=f"read of keys under {prefix}",
            needs=f'key_prefix "{prefix}" {{ policy = "read" }}',
        )

    async def txn(self, operations: Sequence[Mapping[str, Any]]) -> list[KvRow]:
        """All of the KV operations or none (at most 128, and 512 KiB as JSON); rows in their order.

        Raises TxnConflictError when a compare-and-set failed, FencedError when a `check_session` failed.
        """
        payload = [{"KV": dict(operation)} for operation in operations]
        answer = await self.call(
            lambda: self.library.txn.put(payload),
            what=f"transaction of {len(payload)} writes",
            needs=f'key_prefix "{_folder(operations)}" {{ policy = "write" }}',
        )
        return [_kv_row(result["KV"]) for result in answer["Results"] or ()]

    async def check_writable(self, key: str) -> None:
        """Whether our token may write this key. Raises DeniedError if not.

        Consul checks the rights of all operations of a transaction before it adds an entry to its log, and rejects
        the transaction if one operation is invalid: the second one has no key."""
        operations = [cas(key, b"", 1), cas("", b"", 1)]
        try:
            await self.call(
                lambda: self.library.txn.put([{"KV": operation} for operation in operations]),
                what=f"check of the rights to write {key}",
                needs=f'key_prefix "{_folder(operations)}" {{ policy = "write" }}',
            )
        except TerminalError as error:
            if _NO_KEY not in str(error):
                raise

    async def health_checks(
        self, service: str, expression: str = "", index: int = 0, wait_s: float = 30.0
    ) -> tuple[int, list[Any]]:
        """Checks of a service that match a filter expression. Blocks like `kv_tree`."""
        return await self._blocking(
            lambda **how: self.library.health.checks(
                service, near="_agent", filter_expr=expression or None, **how
            ),
            index,
            wait_s,
            what=f"read of the checks of {service}",
            needs=_health_policy(service),
        )

    async def health_service(self, service: str, expression: str = "") -> tuple[int, list[Any]]:
        """Instances of a service with their checks and those of their nodes, all or those that match.

        `near` avoids Consul's streaming backend, which returns an empty list when it times out.
        """
        return await self._blocking(
            lambda **how: self.library.health.service(
                service, near="_agent", filter_expr=expression or None, **how
            ),
            0,
            0.0,
            what=f"read of the health of {service}",
            needs=_health_policy(service),
        )

    async def _blocking(
        self,
        request: Callable[..., Awaitable[Any]],
        index: int,
        wait_s: float,
        *,
        what: str,
        needs: str,
    ) -> tuple[int, list[Any]]:
        """A read by Consul's rules of blocking queries: indexes are whole numbers, never 0, and after a response with a
        lower index than was sent the read is repeated without waiting."""
        how: dict[str, Any] = {}
        if index > 0:
            wait_s = min(wait_s, MAX_WAIT_S)
            how = {"index": index, "wait": f"{max(1, round(wait_s * 1000))}ms"}
        extra_s = wait_s * 17 / 16 if index > 0 else 0.0  # Consul adds up to a sixteenth of jitter
        text, rows = await self.call(
            lambda: request(**how), what=what, needs=needs, extra_s=extra_s
        )
        found = _index(text)
        if found < index:
            text, rows = await self.call(request, what=what, needs=needs)
            found = _index(text)
        return max(found, 1), rows or []

    async def call(
        self,
        request: Callable[[], Awaitable[Any]],
        *,
        what: str,
        needs: str,
        extra_s: float = 0.0,
    ) -> Any:
        """A call of the library with a timeout and translated errors. `needs`: the required rights, as in a policy."""
        try:
            return await self._translated(request, what, needs, extra_s)
        except DeniedError:
            if (fresh := self.settings.read_token()) == self._http.token:
                raise
            self._http.token = fresh
            return await self._translated(request, what, needs, extra_s)

    async def _translated(
        self, request: Callable[[], Awaitable[Any]], what: str, needs: str, extra_s: float
    ) -> Any:
        limit_s = self.settings.timeout_s + extra_s
        started = time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                return await request()
        except TimeoutError as error:
            took_s = time.monotonic() - started
            raise TransientError(f"Consul: {what}: no answer in {took_s:.1f} s") from error
        except (consul.exceptions.ACLPermissionDenied, consul.exceptions.ACLDisabled) as error:
            raise _denied(what, str(error), needs) from error
        except consul.exceptions.ConsulException as error:
            raise _refusal(what, str(error), needs) from error
        except aiohttp.ClientSSLError as error:
            raise TerminalError(f"Consul: {what}: TLS failed: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise TransientError(
                f"Consul at {self.settings.address}: {what}: {str(error) or type(error).__name__}"
            ) from error


def _health_policy(service: str) -> str:
    return f'service "{service}" {{ policy = "read" }} and node_prefix "" {{ policy = "read" }}'


def _folder(operations: Sequence[Mapping[str, Any]]) -> str:
    return str(operations[0]["Key"]).partition("/")[0] + "/" if operations else ""


def _index(text: str) -> int:
    try:
        return whole(text, 0, 2**64 - 1)
    except ValueError as error:
        raise TransientError(
            f"Consul sent the index {text[:40]!r}, which is not a number"
        ) from error


def _kv_row(row: Mapping[str, Any]) -> KvRow:
    # the library decodes the value of a read; the result of a transaction has none
    value = row.get("Value") or b""
    return KvRow(
        row["Key"],
        value if isinstance(value, bytes) else b"",
        int(row["ModifyIndex"]),
        row.get("Session") or "",
        int(row.get("LockIndex") or 0),
    )


def _denied(what: str, reason: str, needs: str) -> DeniedError:
    if is_unknown_token(reason):
        return DeniedError(f"Consul: {what} was denied: {NOT_KNOWN}")
    return DeniedError(f"Consul: {what} was denied ({reason[:200]}); the token needs: {needs}")


def _refusal(what: str, text: str, needs: str) -> WatchdogError:
    """The error for a message of the library, which begins with the status when Consul responded with an error."""
    status, _, body = text.partition(" ")
    if not status.isdecimal():  # a response that cannot be decoded; its body may contain anything
        return TransientError(f"Consul: {what}: the response is not valid")
    if status == "409":
        return _txn_refusal(what, body, needs)
    if is_unknown_token(body):
        return _denied(what, body, needs)
    if "invalid session" in body:  # a client agent puts its origin before the text
        return FencedError(f"Consul: {what}: the session has ended")
    message = f"Consul: {what}: {status} {body[:200].strip()}"
    if status in {"408", "429"} or status.startswith("5"):
        return TransientError(message)
    return TerminalError(message)


def _txn_refusal(what: str, body: str, needs: str) -> TerminalError | ConflictError | FencedError:
    try:
        errors = [(int(e["OpIndex"]), str(e["What"])) for e in loads(body)["Errors"]]
    except (ValueError, TypeError, KeyError):
        return TerminalError(f"Consul: {what}: 409 without reasons")
    for _, reason in errors:
        if "Permission denied" in reason or "ACL" in reason:
            return _denied(what, reason, needs)
        if "failed session check" in reason or "invalid session" in reason:
            # the reason contains the ids of sessions, which are secrets
            return FencedError(f"Consul: {what}: the lease is no longer ours")
        if "index is stale" not in reason:
            return TerminalError(f"Consul: {what} was refused: {reason[:200]}")
    lost = frozenset(position for position, _ in errors)
    return TxnConflictError(f"Consul: {what}: {len(lost)} conflicts with another writer", lost)


_NO_KEY: Final = "Must provide key"


def cas(key: str, value: bytes, index: int) -> dict[str, Any]:
    """Operation that writes key if its index is unchanged; 0 = it must not exist."""
    return {"Verb": "cas", "Key": key, "Value": base64.b64encode(value).decode(), "Index": index}


def delete_cas(key: str, index: int) -> dict[str, Any]:
    """Operation that deletes key if its index is unchanged."""
    return {"Verb": "delete-cas", "Key": key, "Index": index}


def put(key: str, value: bytes) -> dict[str, Any]:
    """Operation that writes key unconditionally."""
    return {"Verb": "set", "Key": key, "Value": base64.b64encode(value).decode()}


def check_session(key: str, session: str) -> dict[str, Any]:
    """Operation that fails the transaction unless the session holds key's lock."""
    return {"Verb": "check-session", "Key": key, "Session": session}
