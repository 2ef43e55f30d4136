"""A client of the HTTP API that uses only the standard library, so that commands start fast."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from ssl import SSLContext
from typing import Final, TypeVar, overload
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.cli._answers import Fields, LeasesAnswer, NextPage, Page, parse
from nomad_watchdog.cli._proxy import proxy_for
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    TerminalError,
    TransientError,
    UserError,
    WatchdogError,
)

TIMEOUT_S: Final = 15.0
SILENCE_S: Final = 90.0
"""A stream without even a heartbeat for this time is dead."""
MAX_BODY: Final = 64 * 1024 * 1024
MAX_LINE: Final = 1024 * 1024
PAGE: Final = 500
T = TypeVar("T")


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirects, which would send the token to another server."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


class ApiClient:
    """Raises UserError, NotFoundError, DeniedError, ConflictError or TransientError depending on the response, and
    TerminalError if there is none."""

    def __init__(
        self,
        address: str,
        token: str = "",
        *,
        timeout_s: float = TIMEOUT_S,
        tls: Callable[[], SSLContext] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`tls`: creates the TLS context; called only for an https address. `env`: the variables with proxies;
        None = this process's environment."""
        address = address if "//" in address else f"http://{address}"
        try:
            parts = urlsplit(address)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # the port, or the brackets of an IPv6 address
            valid = False
        if not valid:
            shown = ascii(address[:100])
            raise UserError(f"API address {shown} must be http://HOST:PORT or https://HOST:PORT")
        if parts.username or parts.password:
            raise UserError("API address must not contain a user or password; use a token file")
        self.address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._token = token
        self._timeout_s = timeout_s
        self._tls = tls
        self._env = env
        secure = (
            [HTTPSHandler(context=tls())] if tls is not None and parts.scheme == "https" else []
        )
        # Not urllib's own choice, which would use a proxy for a loopback address.
        self._proxy = proxy_for(self.address, os.environ if env is None else env)
        proxies = {parts.scheme: self._proxy.url} if self._proxy else {}
        self._opener = build_opener(_NoRedirect, ProxyHandler(proxies), *secure)

    def at(self, address: str) -> ApiClient:
        """The same client at another address, which another replica has. Raises TerminalError for one in plain text
        where this one uses TLS: the token would be sent there."""
        if self._token and self.address.startswith("https:") and not address.startswith("https:"):
            raise TerminalError(
                f"{self.address} names a replica at {address[:100]!a}, and the token is not sent there without "
                "TLS; set api.own_address of that replica to an https address"
            )
        return ApiClient(
            address, self._token, timeout_s=self._timeout_s, tls=self._tls, env=self._env
        )

    def holders(self) -> list[ApiClient]:
        """One client per replica that holds shards: each replica plans only its own shards.

        For a single replica this client is used: the address that it advertises need not be reachable from here."""
        leases = self.get("/v1/leases", LeasesAnswer)
        if len(leases["replicas"]) < 2:
            return [self]
        found = sorted({one["api"] for one in leases["shards"] if one["api"]})
        return [self.at(address) for address in found] or [self]

    @overload
    def get(self, path: str, /, **query: object) -> Fields: ...
    @overload
    def get(self, path: str, shape: type[T], /, **query: object) -> T: ...
    def get(self, path: str, shape: type[object] = dict, /, **query: object) -> object:
        """The answer, which has the form `shape`. Raises TerminalError if it has not."""
        return self.parsed(self._call("GET", path, query=query), shape)

    def put(self, path: str, body: object) -> Fields:
        return self._call("PUT", path, body=body)

    @overload
    def post(self, path: str, body: object) -> Fields: ...
    @overload
    def post(self, path: str, body: object, shape: type[T]) -> T: ...
    def post(self, path: str, body: object, shape: type[object] = dict) -> object:
        """As `get`."""
        return self.parsed(self._call("POST", path, body=body), shape)

    def delete(self, path: str) -> Fields:
        return self._call("DELETE", path)

    def parsed(self, answer: Fields, shape: type[T]) -> T:
        """An answer, or an item of one, in the form `shape`. Raises TerminalError if it has another one."""
        try:
            return parse(answer, shape)
        except ValueError as error:
            raise self._not_the_api(str(error)) from error

    def _not_the_api(self, why: str) -> TerminalError:
        return TerminalError(f"{self.address} did not answer as the API does: {why}")

    def devices(self, **query: object) -> Iterator[Fields]:
        """All devices that match."""
        return self.pages("/v1/devices", **query)

    def pages(self, path: str, **query: object) -> Iterator[Fields]:
        """All items of a list, page by page."""
        cursor: str | None = None
        while True:
            page = self.parsed(
                self._call("GET", path, query={"limit": PAGE} | query | {"cursor": cursor}),
                NextPage,
            )
            yield from page["items"]
            following = page.get("next")
            if not following or following == cursor:
                return
            cursor = following

    def lines(self, path: str, **query: object) -> Iterator[Fields]:
        """The objects of an NDJSON stream; empty lines are heartbeats."""
        try:
            with self._open("GET", path, query=query, timeout_s=SILENCE_S) as answer:
                while line := answer.readline(MAX_LINE):
                    if line.strip():
                        yield _object(loads(line))
        except (OSError, HTTPException, ValueError) as error:
            raise TransientError(f"event stream of {self.address} broke: {error}") from error

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        body: object = None,
    ) -> Fields:
        try:
            with self._open(method, path, query=query, body=body) as response:
                data = response.read(MAX_BODY + 1)
        except (OSError, HTTPException) as error:
            raise TransientError(f"{self.address} broke off: {error}") from error
        if len(data) > MAX_BODY:
            raise TerminalError(f"{self.address} sent more than {MAX_BODY} bytes")
        try:
            answer: object = loads(data) if data.strip() else {}
        except ValueError as error:
            raise TerminalError(f"{self.address} did not answer JSON; is it the API?") from error
        try:
            return _object(answer)
        except ValueError as error:
            raise self._not_the_api(str(error)) from error

    def _open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        body: object = None,
        timeout_s: float | None = None,
    ) -> HTTPResponse:
        wanted = {key: value for key, value in (query or {}).items() if value not in (None, "", ())}
        url = f"{self.address}{path}" + (f"?{urlencode(wanted, doseq=True)}" if wanted else "")
        request = Request(url, method=method)  # the scheme was checked in __init__
        request.add_header("Accept", "application/json")
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            response: HTTPResponse = self._opener.open(
                request, timeout=timeout_s or self._timeout_s
            )
        except HTTPError as error:
            with error:
                via = f" through the proxy {self._proxy.shown}" if self._proxy else ""
                raise refusal(error.code, error.read(65536), f"{self.address}{via}") from error
        except (URLError, OSError, HTTPException, UnicodeError) as error:
            why = getattr(error, "reason", error)
            why = getattr(why, "strerror", None) or why
            if self._proxy is not None:
                raise TerminalError(
                    f"no answer from the API at {self.address} through the proxy {self._proxy.shown}: "
                    f"{why}; name the API's host in no_proxy to call it directly"
                ) from error
            raise TerminalError(
                f"no answer from the API at {self.address}: {why}; is `nomad-watchdog run` running "
                "there? Set another address with --address or NOMAD_WATCHDOG_ADDR"
            ) from error
        return response


def _object(answer: object) -> Fields:
    """An answer or an event. Raises ValueError if it is not an object, or its items are not a list of objects."""
    if not isinstance(answer, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004  # the type of an answer is data
    if "items" in answer:
        parse(answer, Page)
    return answer


def device_path(device_id: str, *more: str) -> str:
    """The path of a device. The id is percent-encoded, including slashes. "." and ".." can't be encoded."""
    if device_id in (".", ".."):
        raise UserError(
            f"device id {device_id!r} can't be addressed in a URL; use `devices import`"
        )
    return "/".join(("/v1/devices", quote(device_id, safe=""), *more))


def quoted(text: str) -> str:
    """A text as one segment of a path. Raises UserError."""
    if text in ("", ".", ".."):
        raise UserError(f"{text!a} can't be addressed in a URL")
    return quote(text, safe="")


_LASTING_CONFLICTS: Final = frozenset({"precondition", "outofdate"})
"""Codes of 409 after which the same request fails again."""
_LASTING_FAILURES: Final = frozenset({"terminal", "unprepared"})


def refusal(status: int, body: bytes, address: str) -> WatchdogError:
    """The error for a response, from which the exit codes of docs/cli.md follow. Responses of the API have a code,
    those of a proxy have none."""
    try:
        error = loads(body)["error"]
        text, code = str(error["message"]), str(error.get("code", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        text, code = f"{address} answered HTTP {status}", ""
    if status == 404:
        return NotFoundError(text)
    if status in (401, 403):
        return DeniedError(f"{text}; set NOMAD_WATCHDOG_TOKEN_FILE to the file with the token")
    if status == 409 and code not in _LASTING_CONFLICTS:
        return ConflictError(text)
    if status == 502 and code == "denied":  # the service's own token, not ours
        return DeniedError(text)
    if status == 502 and code in _LASTING_FAILURES:
        return TerminalError(text)
    if status == 429 or status >= 500:
        return TransientError(text)
    return UserError(text) if status >= 400 else TerminalError(text)
