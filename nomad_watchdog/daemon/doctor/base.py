"""What all checks of `doctor` use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Final, NamedTuple

import aiohttp

from nomad_watchdog.clients import consul, nomad
from nomad_watchdog.clients.consul import ConsulAccess
from nomad_watchdog.clients.nomad import NomadAccess
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import DeniedError, TransientError, WatchdogError

SKEW_S: Final = 5.0
TIMEOUT_S: Final = 5.0


class CheckStatus(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Check(NamedTuple):
    """What one check of `doctor` found, and how to fix it."""

    name: str
    status: CheckStatus
    found: str
    fix: str = ""


class ServerClient:
    """Calls Nomad or Consul as the control plane does: with the same address, token, namespace, region and TLS.
    Nothing is retried."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: NomadAccess | ConsulAccess,
        params: Mapping[str, str],
    ) -> None:
        self._session, self._settings, self._params = session, settings, params
        self._tls = settings.ssl_context() or True
        self.date = ""

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        params: Mapping[str, str] | None = None,
    ) -> tuple[int, object]:
        """The HTTP status, and the body as JSON or else as text."""
        async with self._session.request(
            method,
            f"{self._settings.address}{path}",
            json=body,
            params=self._params if params is None else params,
            ssl=self._tls,
            server_hostname=self._settings.tls_server_name or None,
            allow_redirects=False,
        ) as answer:
            self.date = answer.headers.get("Date", "")
            text = await answer.text()
            if answer.status >= 400 and (unknown := _unknown_token(self._settings, text)):
                raise DeniedError(unknown)
            if "json" in answer.headers.get("Content-Type", "") or text[:1] in '{["':
                try:
                    return answer.status, (await answer.json(content_type=None))
                except ValueError:
                    return answer.status, text
            return answer.status, text


def _unknown_token(settings: NomadAccess | ConsulAccess, text: str) -> str:
    """The error if the server does not know the token, else "". The rights of such a token can't be checked."""
    if isinstance(settings, ConsulAccess):
        return consul.NOT_KNOWN if consul.is_unknown_token(text) else ""
    return nomad.NOT_KNOWN if nomad.is_unknown_token(text) else ""


def mapping(value: object) -> Mapping[str, object]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: object) -> list[Mapping[str, object]]:
    """The objects of a JSON list; empty if the value is not a list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


async def guarded(name: str, checks: Callable[[], Awaitable[list[Check]]]) -> list[Check]:
    try:
        return await checks()
    except (aiohttp.ClientError, TimeoutError, OSError, TransientError) as error:
        why = str(error) or type(error).__name__
        where = "kubeconfig" if name == "kubernetes" else "address, ca_cert and the token"
        fix = f"start it, or set {name}.{where}"
        return [Check(f"{name} reachable", CheckStatus.FAIL, why, fix)]
    except DeniedError as error:
        return [denied_check(f"{name} token", error)]
    except WatchdogError as error:
        return [Check(f"{name} settings", CheckStatus.FAIL, str(error), f"see the {name} block")]


def denied_check(name: str, error: DeniedError) -> Check:
    """A failed check from an error: the text before the last `; ` is what was found, the rest is the fix."""
    found, _, fix = str(error).rpartition("; ")
    return Check(
        name, CheckStatus.FAIL, found or fix, fix if found else "grant the rights to the token"
    )


@asynccontextmanager
async def open_server(
    settings: NomadAccess | ConsulAccess,
    headers: Mapping[str, str],
    params: Mapping[str, str] | None = None,
) -> AsyncIterator[ServerClient]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    sent = {name: value for name, value in headers.items() if value}
    async with aiohttp.ClientSession(timeout=timeout, headers=sent) as session:
        yield ServerClient(session, settings, params or {})


def clock_check(name: str, date: str) -> Check:
    try:
        there = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return Check(f"{name} clock", CheckStatus.WARN, "the response had no date")
    skew = SystemClock().wall() - there
    if abs(skew) <= SKEW_S:
        return Check(f"{name} clock", CheckStatus.OK, f"differs by less than {SKEW_S:g} s")
    fix = "run a time daemon on both machines: certificates, tokens and ages depend on it"
    return Check(f"{name} clock", CheckStatus.WARN, f"differs by {skew:.0f} s", fix)
