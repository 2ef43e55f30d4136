"""What each check of `doctor` is made of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any, Final

import aiohttp

from nomad_watchdog.clients import consul, nomad
from nomad_watchdog.clients.consul import ConsulAccess
from nomad_watchdog.clients.nomad import NomadAccess
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import DeniedError, TransientError, WatchdogError

SKEW_S: Final = 5.0
TIMEOUT_S: Final = 5.0


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Status
    found: str
    mend: str = ""


class _Server:
    """GET, PUT and POST of JSON as the control plane itself asks: the same address, token, namespace, region
    and TLS. Nothing is retried: doctor reports what is."""

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
    ) -> tuple[int, Any]:
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


def _unknown_token(settings: NomadAccess | ConsulAccess, said: str) -> str:
    """What is wrong, if the server does not know the token: then no check says anything about its rights."""
    if isinstance(settings, ConsulAccess):
        return consul.NOT_KNOWN if consul.is_unknown_token(said) else ""
    return nomad.NOT_KNOWN if nomad.is_unknown_token(said) else ""


async def _guarded(name: str, checks: Callable[[], Awaitable[list[Check]]]) -> list[Check]:
    try:
        return await checks()
    except (aiohttp.ClientError, TimeoutError, OSError, TransientError) as error:
        why = str(error) or type(error).__name__
        where = "kubeconfig" if name == "kubernetes" else "address, ca_cert and the token"
        mend = f"start it, or set {name}.{where}"
        return [Check(f"{name} reachable", Status.FAIL, why, mend)]
    except DeniedError as error:
        return [_refused(f"{name} token", error)]
    except WatchdogError as error:
        return [Check(f"{name} settings", Status.FAIL, str(error), f"see the {name} block")]


def _refused(name: str, error: DeniedError) -> Check:
    """What the server denies, and what the error says to do about it."""
    found, _, mend = str(error).rpartition("; ")
    return Check(
        name, Status.FAIL, found or mend, mend if found else "grant the rights to the token"
    )


@asynccontextmanager
async def _server(
    settings: NomadAccess | ConsulAccess,
    headers: Mapping[str, str],
    params: Mapping[str, str] | None = None,
) -> AsyncIterator[_Server]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    sent = {name: value for name, value in headers.items() if value}
    async with aiohttp.ClientSession(timeout=timeout, headers=sent) as session:
        yield _Server(session, settings, params or {})


def _skew(name: str, date: str) -> Check:
    try:
        there = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return Check(f"{name} clock", Status.WARN, "the answer had no date")
    skew = SystemClock().wall() - there
    if abs(skew) <= SKEW_S:
        return Check(f"{name} clock", Status.OK, f"differs by less than {SKEW_S:g} s")
    mend = "run a time daemon on both machines: certificates, tokens and ages depend on it"
    return Check(f"{name} clock", Status.WARN, f"differs by {skew:.0f} s", mend)
