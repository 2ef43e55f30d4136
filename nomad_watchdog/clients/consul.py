"""Consul over HTTP: the only module that imports `consul` (the package py-consul).

Three things that the library leaves out are done once, below its API (`_Http`): the token on every
call, a bound on connections and time, and the header that tells of results hidden by ACLs.
"""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import aiohttp
import consul.aio  # type: ignore[import-untyped]  # py-consul ships no types
import consul.base  # type: ignore[import-untyped]
import consul.exceptions  # type: ignore[import-untyped]
from watchdog_agent.runtime.parsing import loads, whole

from nomad_watchdog import text_files
from nomad_watchdog.clients import hashicorp_environment
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    FencedError,
    TerminalError,
    TransientError,
    UserError,
    WatchdogError,
)

_T = TypeVar("_T")
_MAX_CONNECTIONS: Final = 16
"""Consul allows 200 a client address, and all agents of a host share one; held watches count."""
MAX_WAIT_S: Final = 60.0
"""Longest blocking query: also the longest sleep after a missed wake-up (a restored snapshot)."""


@dataclass(frozen=True, slots=True)
class ConsulAccess:
    """Where Consul is and how to speak to it."""

    address: str = "http://127.0.0.1:8500"
    token: str = field(default="", repr=False)
    token_file: str = ""
    """Read at start, and again when Consul refuses the token."""
    ca_cert: str = ""
    ca_path: str = ""
    client_cert: str = ""
    client_key: str = ""
    tls_skip_verify: bool = False
    tls_server_name: str = ""
    namespace: str = ""
    timeout_s: float = 10.0
    """Of one call, beyond what a blocking query is asked to wait."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **explicit: Any) -> ConsulAccess:
        """Consul's own variables (`hashicorp.CONSUL`, CONSUL_HTTP_SSL, CONSUL_HTTP_TOKEN); what is given
        explicitly beats them. Raises UserError for a value that won't do."""
        env = os.environ if env is None else env
        settings = cls(
            **hashicorp_environment.settings_with("consul", "CONSUL_HTTP_TOKEN", env, explicit)
        )
        try:
            checked = hashicorp_environment.checked_address(settings.address)
        except ValueError as error:
            raise UserError(f"consul address: {error}") from None
        try:
            return replace(settings, address=hashicorp_environment.secured(checked, env))
        except ValueError as error:
            raise UserError(f"{hashicorp_environment.SSL}: {error}") from None

    def endpoint(self) -> tuple[str, str, int]:
        """Scheme, host and port; the port is the scheme's own when the address names none."""
        host, port = hashicorp_environment.host_and_port(self.address)
        return self.address.partition("://")[0], host, port

    def ssl_context(self) -> ssl.SSLContext | None:
        """None over http. Raises UserError when a certificate can't be read."""
        if not self.address.startswith("https://"):
            return None
        return hashicorp_environment.trust(
            "consul",
            ca_cert=self.ca_cert,
            ca_path=self.ca_path,
            client_cert=self.client_cert,
            client_key=self.client_key,
            skip_verify=self.tls_skip_verify,
        )

    def read_token(self) -> str:
        """The token now. Raises UserError when its file can't be read."""
        if not self.token_file:
            return self.token
        # As in Consul's CLI the file takes precedence, unless it is empty.
        return text_files.token("consul.token_file", self.token_file) or self.token


NOT_KNOWN: Final = "Consul does not know this token; check consul.token_file (or CONSUL_HTTP_TOKEN)"
"""Of a token that was deleted, that has expired, or that is of another cluster."""


@dataclass(frozen=True, slots=True)
class KvRow:
    """One key of Consul's store."""

    key: str
    value: bytes
    index: int
    """ModifyIndex, the token of compare-and-set."""
    session: str = field(default="", repr=False)
    """The session that holds the key's lock; "" = nobody does. A secret: who knows it can let go of it."""
    lock_index: int = 0
    """Goes up each time the lock is taken anew: the fencing token."""


class TxnConflictError(ConflictError):
    """Nothing of the transaction was written. `lost`: positions of the operations that failed."""

    def __init__(self, message: str, lost: frozenset[int]) -> None:
        super().__init__(message)
        self.lost = lost


class _Http(consul.aio.HTTPClient):  # type: ignore[misc]  # untyped base
    """The library's HTTP layer with the token on all calls (it leaves it off transactions)."""

    def __init__(self, settings: ConsulAccess) -> None:
        scheme, host, port = settings.endpoint()
        consul.base.HTTPClient.__init__(self, host, port, scheme)
        self.base_uri = (
            settings.address
        )  # with the path of a reverse proxy, which the library leaves out
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
        if self._session is None:  # made here because it needs the running loop
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
    """What this project needs of Consul. Belongs to the event loop of its first call.

    All methods raise TransientError (no answer in time, 429, 5xx), DeniedError (the message names the
    policy that is missing) and TerminalError (refused for good). A cancelled call closes its connection.
    """

    def __init__(self, settings: ConsulAccess | None = None) -> None:
        self.settings = settings or ConsulAccess.from_env()
        self._http = _Http(self.settings)
        self.library = _Library(self._http)
        """For this package only: elsewhere nobody knows the library."""

    async def close(self) -> None:
        await self._http.close()

    async def kv_get(self, key: str) -> KvRow | None:
        """One key, exactly, as a quorum has it now; None when it is not there (404)."""
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

        index > 0 waits, at most wait_s, until something changed past it; the answer may be unchanged.
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
        """The index of all keys under prefix (ends with "/") as soon as it is another one than `index`, which
        is the last that was read; `index` itself after wait_s seconds. Only names of folders are transferred.
        0 when the key `beacon`, directly under prefix, is not among the names: without rights Consul answers as
        if there were no keys.

        A restored snapshot ends a blocking query at once, with the index that was sent. The next query would wait
        for an index that only the lost history had, so after an early answer the store is asked plainly.
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

        Raises TxnConflictError when a compare-and-set lost, FencedError when a `check_session` did.
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
        """Checks of a service that match a filter expression; blocks as `kv_tree` does."""
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
        """Instances of a service with their checks and their node's, all or those that match.

        `near` keeps Consul from its streaming backend, which answers an empty list when it times out.
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
        """A read under Consul's rules of blocking queries: indexes are whole numbers, never 0, and an
        answer with a lower index than was sent is thrown away and asked for again plainly."""
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
        """A call of the library with our time-out and errors; `needs`: the rights, in Consul's words."""
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
        raise TransientError(f"Consul sent the index {text[:40]!r}, which is no number") from error


def _kv_row(row: Mapping[str, Any]) -> KvRow:
    # the library decodes the value of a read; a transaction's result has none
    value = row.get("Value") or b""
    return KvRow(
        row["Key"],
        value if isinstance(value, bytes) else b"",
        int(row["ModifyIndex"]),
        row.get("Session") or "",
        int(row.get("LockIndex") or 0),
    )


def is_unknown_token(said: str) -> bool:
    """Whether Consul refuses a token because there is none of its name, whatever its rights were."""
    return "acl not found" in said.lower()


def _denied(what: str, said: str, needs: str) -> DeniedError:
    if is_unknown_token(said):
        return DeniedError(f"Consul: {what} was denied: {NOT_KNOWN}")
    return DeniedError(f"Consul: {what} was denied ({said[:200]}); the token needs: {needs}")


def _refusal(what: str, text: str, needs: str) -> WatchdogError:
    """The library's messages begin with the status when Consul answered with an error."""
    status, _, body = text.partition(" ")
    if not status.isdecimal():  # an answer that can't be decoded: its body may hold anything
        return TransientError(f"Consul: {what}: the answer makes no sense")
    if status == "409":
        return _txn_refusal(what, body, needs)
    if is_unknown_token(body):
        return _denied(what, body, needs)
    if "invalid session" in body:  # behind a client agent the words begin with where they come from
        return FencedError(f"Consul: {what}: the session is over")
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
            # the reason names both sessions, and a session's id is a secret
            return FencedError(f"Consul: {what}: the lease is no longer ours")
        if "index is stale" not in reason:
            return TerminalError(f"Consul: {what} was refused: {reason[:200]}")
    lost = frozenset(position for position, _ in errors)
    return TxnConflictError(f"Consul: {what}: {len(lost)} lost against another writer", lost)


_NO_KEY: Final = "Must provide key"


def cas(key: str, value: bytes, index: int) -> dict[str, Any]:
    """The transaction's operation that writes key if its index is still so; 0 = it must not exist."""
    return {"Verb": "cas", "Key": key, "Value": base64.b64encode(value).decode(), "Index": index}


def delete_cas(key: str, index: int) -> dict[str, Any]:
    """The transaction's operation that deletes key if its index is still so."""
    return {"Verb": "delete-cas", "Key": key, "Index": index}


def put(key: str, value: bytes) -> dict[str, Any]:
    """The transaction's operation that writes key, whatever it holds."""
    return {"Verb": "set", "Key": key, "Value": base64.b64encode(value).decode()}


def check_session(key: str, session: str) -> dict[str, Any]:
    """The transaction's operation that lets the others happen only if the session holds key's lock."""
    return {"Verb": "check-session", "Key": key, "Session": session}
