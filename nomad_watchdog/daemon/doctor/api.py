"""Checks whether agents reach the control plane, and whether it accepts their reports.

Nothing is changed: the report that is sent has no content, so it is rejected after its credential was accepted.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import aiohttp
from watchdog_agent import wire

from nomad_watchdog.config.settings import Settings
from nomad_watchdog.core.agent_token import TokenClaim, issue
from nomad_watchdog.daemon.doctor.base import Check, CheckStatus, mapping, objects
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Epoch, Monotonic
from nomad_watchdog.secret_files import SecretFile, read_keys, read_token

TIMEOUT_S: Final = 5.0


async def checks(settings: Settings) -> list[Check]:
    """Connect to `api.advertise` as agents do, and read how many agents are silent or refused."""
    where = settings.advertise
    try:
        tls = _trust(settings)
    except (OSError, ValueError) as error:
        what = f"the files that verify {where} can't be used: {error}"
        return [
            Check(
                "api.advertise",
                CheckStatus.FAIL,
                what,
                "set api.ca_cert to the authority that signed api.cert",
            )
        ]
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        try:
            status, answer = await _call(session, "GET", f"{where}/ready", tls)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return [await _unreached(settings, _why(error))]
        if "ready" not in answer:
            what = f"{where} answers, but is not a control plane of nomad-watchdog (HTTP {status})"
            return [
                Check(
                    "api.advertise",
                    CheckStatus.FAIL,
                    what,
                    "set api.advertise to where agents reach the API",
                )
            ]
        found: list[Check] = [Check("api.advertise", CheckStatus.OK, f"{where} answers", "")]
        if settings.api.agent_key_file or settings.api.agent_token_file:
            found.append(await _credential(session, settings, tls))
        found += await _status(session, settings, tls)
    return found


async def agents(settings: Settings) -> dict[str, str]:
    """The addresses of the agents as the control plane lists them (`host:port` → device), those first whose last
    report is oldest; none if the list can't be read."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        token, tls = _operator_token(settings), _trust(settings)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            url = f"{settings.advertise}/v1/agents?limit=1000"
            _, answer = await _call(session, "GET", url, tls, token)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, UserError):
        return {}
    found = [one for one in objects(answer.get("items")) if one.get("listen")]
    found.sort(key=_report_age_s, reverse=True)
    return {str(one["listen"]): str(one.get("id")) for one in found}


def _report_age_s(agent: Mapping[str, object]) -> float:
    age_s = agent.get("report_age_s")
    return age_s if isinstance(age_s, int | float) else 0.0


def _operator_token(settings: Settings) -> str:
    """The operator's token, "" if none is set. Raises UserError."""
    if not settings.api.token_file:
        return ""
    file = SecretFile("api.token_file", Path(settings.api.token_file), read_token)
    (secret,) = file.required().now(Monotonic(0.0))
    return secret.decode()


def _why(error: Exception) -> str:
    """Why a call failed: the text of a system error, without addresses and library names."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
        return os.strerror(cause.errno).lower()
    return str(error) or "no answer in time"


def _trust(settings: Settings) -> ssl.SSLContext | bool:
    if not settings.advertise.startswith("https") or not settings.api.ca_cert:
        return True
    return ssl.create_default_context(cafile=settings.api.ca_cert)


async def _call(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    tls: ssl.SSLContext | bool,
    token: str = "",
) -> tuple[int, Mapping[str, object]]:
    """The HTTP status, and the JSON object of the response; an empty one if there is none."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    body: dict[str, object] | None = {} if method == "POST" else None
    async with session.request(
        method, url, json=body, headers=headers, ssl=tls, allow_redirects=False
    ) as answer:
        try:
            return answer.status, mapping(await answer.json(content_type=None))
        except ValueError:
            return answer.status, {}


async def _unreached(settings: Settings, why: str) -> Check:
    """A failed check if the control plane runs, else a warning: that it does not run is not a wrong setting."""
    host, _, port = settings.api.listen.rpartition(":")
    host = host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104  # to compare
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError):
        what = f"no answer at {settings.advertise}: the control plane does not run ({why})"
        return Check("api.advertise", CheckStatus.WARN, what, "run doctor again while it runs")
    writer.close()
    what = f"the control plane runs at {settings.api.listen}, and agents can't reach it at {settings.advertise}: {why}"
    return Check(
        "api.advertise",
        CheckStatus.FAIL,
        what,
        "set api.advertise to where agents reach the API, or open its port",
    )


async def _credential(
    session: aiohttp.ClientSession, settings: Settings, tls: ssl.SSLContext | bool
) -> Check:
    """Whether the control plane accepts the credential that new agents are given."""
    api = settings.api
    name = "agents' credentials" if api.agent_key_file else "agents' token"
    setting = "api.agent_key_file" if api.agent_key_file else "api.agent_token_file"
    path = api.agent_key_file or api.agent_token_file
    assert path is not None
    try:
        reader = read_keys if api.agent_key_file else read_token
        (secret, *_) = SecretFile(setting, Path(path), reader).required().now(Monotonic(0.0))
    except UserError as error:
        return Check(
            name, CheckStatus.WARN, str(error), f"run doctor where the files of {setting} are"
        )
    token = secret.decode()
    if api.agent_key_file:
        token = issue(secret, TokenClaim(slug_of(DeviceId("doctor")), Epoch(0)))
    try:
        status, _ = await _call(session, "POST", settings.advertise + wire.REPORT_PATH, tls, token)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return Check(name, CheckStatus.WARN, _why(error), "run doctor again")
    if status in (401, 403):
        what = f"the control plane at {settings.advertise} rejects the credential from {setting} (HTTP {status})"
        fix = f"it runs with another {setting}: use the same file for both, and keep the old key below the new one"
        return Check(name, CheckStatus.FAIL, what, fix)
    return Check(
        name, CheckStatus.OK, f"the control plane accepts the credential from {setting}", ""
    )


async def _status(
    session: aiohttp.ClientSession, settings: Settings, tls: ssl.SSLContext | bool
) -> list[Check]:
    """Checks of the status: how many running agents are refused or silent, and whether the registry went back in
    time."""
    name = "agents heard"
    try:
        token = _operator_token(settings)
    except UserError as error:
        return [Check(name, CheckStatus.WARN, str(error), "run doctor where api.token_file is")]
    try:
        status, answer = await _call(session, "GET", f"{settings.advertise}/v1/status", tls, token)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return [Check(name, CheckStatus.WARN, _why(error), "run doctor again")]
    if status != 200 or not isinstance(answer.get("unheard"), dict):
        return [
            Check(
                name,
                CheckStatus.WARN,
                f"the status can't be read (HTTP {status})",
                "set api.token_file",
            )
        ]
    found = [_unheard(mapping(answer["unheard"]))]
    if restored := answer.get("registry_restored"):
        fix = "see docs/runbooks.md, RegistryRestored; a restart of the control plane ends this warning"
        found.append(Check("registry restored", CheckStatus.WARN, str(restored), fix))
    return found


def _unheard(counts: Mapping[str, object]) -> Check:
    name = "agents heard"
    refused, silent = counts.get("refused", 0), counts.get("silent", 0)
    if not refused and not silent:
        return Check(name, CheckStatus.OK, "the reports of all running agents arrive", "")
    what = f"the reports of {refused} running agents are refused, and {silent} are silent"
    fix = "see `devices ls --verdict unwatched` for the reason, and docs/runbooks.md, AgentsUnheard"
    return Check(name, CheckStatus.FAIL, what, fix)
