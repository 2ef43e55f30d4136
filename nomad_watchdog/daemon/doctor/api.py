"""Whether agents reach the control plane, and whether their reports are believed: doctor's checks of the API.

Each gives (name, "ok", "warn" or "fail", what was found, what to do). Nothing is changed: the report that is sent
has no content, so that it is refused for that, unless its credential is refused before.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path
from typing import Any, Final

import aiohttp
from watchdog_agent import wire

from nomad_watchdog.config.settings import Settings
from nomad_watchdog.core.agent_token import TokenClaim, issue
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Epoch, Monotonic
from nomad_watchdog.secret_files import SecretFile, read_keys, read_token

TIMEOUT_S: Final = 5.0
Found = tuple[str, str, str, str]


async def checks(settings: Settings) -> list[Found]:
    """Connect to `api.advertise` as agents do, and ask there how many agents are not heard."""
    where = settings.advertise
    try:
        tls = _trust(settings)
    except (OSError, ValueError) as error:
        what = f"the files that {where} is verified with can't be used: {error}"
        return [
            ("api.advertise", "fail", what, "set api.ca_cert to the authority that signed api.cert")
        ]
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        try:
            status, answer = await _call(session, "GET", f"{where}/ready", tls)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return [await _unreached(settings, _why(error))]
        if "ready" not in answer:
            what = f"{where} answers, but is no control plane of nomad-watchdog (HTTP {status})"
            return [
                ("api.advertise", "fail", what, "set api.advertise to where agents reach the API")
            ]
        found: list[Found] = [("api.advertise", "ok", f"{where} answers", "")]
        if settings.api.agent_key_file or settings.api.agent_token_file:
            found.append(await _believed(session, settings, tls))
        found += await _status(session, settings, tls)
    return found


async def agents(settings: Settings) -> dict[str, str]:
    """Where the control plane says that agents are (`host:port` → device), those first that it has not heard for
    longest; none if it does not say."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        token, tls = _operator_token(settings), _trust(settings)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            url = f"{settings.advertise}/v1/agents?limit=1000"
            _, said = await _call(session, "GET", url, tls, token)
        found = [(one["report_age_s"], one["listen"], one["id"]) for one in said.get("items", ())]
        found = sorted((one for one in found if one[1]), reverse=True)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError, UserError):
        return {}
    return {str(listen): str(device) for _, listen, device in found}


def _operator_token(settings: Settings) -> str:
    """The operator's token, "" if none is set. Raises UserError."""
    if not settings.api.token_file:
        return ""
    file = SecretFile("api.token_file", Path(settings.api.token_file), read_token)
    (secret,) = file.required().now(Monotonic(0.0))
    return secret.decode()


def _why(error: Exception) -> str:
    """Why a call failed, in words: a system error by its name, without addresses and library names."""
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
) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    body: dict[str, Any] | None = {} if method == "POST" else None
    async with session.request(
        method, url, json=body, headers=headers, ssl=tls, allow_redirects=False
    ) as answer:
        try:
            said = await answer.json(content_type=None)
        except ValueError:
            said = None
        return answer.status, said if isinstance(said, dict) else {}


async def _unreached(settings: Settings, why: str) -> Found:
    """The control plane may just not be running: that is no mistake of the settings."""
    host, _, port = settings.api.listen.rpartition(":")
    host = host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104  # to compare
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError):
        what = f"nothing answers at {settings.advertise}: the control plane does not run ({why})"
        return "api.advertise", "warn", what, "run doctor again while it runs"
    writer.close()
    what = f"the control plane runs at {settings.api.listen}, and agents can't reach it at {settings.advertise}: {why}"
    return (
        "api.advertise",
        "fail",
        what,
        "set api.advertise to where agents reach the API, or open its port",
    )


async def _believed(
    session: aiohttp.ClientSession, settings: Settings, tls: ssl.SSLContext | bool
) -> Found:
    """Whether the control plane believes what agents that start now are given."""
    api = settings.api
    name = "agents' credentials" if api.agent_key_file else "agents' token"
    setting = "api.agent_key_file" if api.agent_key_file else "api.agent_token_file"
    path = api.agent_key_file or api.agent_token_file
    assert path is not None
    try:
        reader = read_keys if api.agent_key_file else read_token
        (secret, *_) = SecretFile(setting, Path(path), reader).required().now(Monotonic(0.0))
    except UserError as error:
        return name, "warn", str(error), f"run doctor where the files of {setting} are"
    token = secret.decode()
    if api.agent_key_file:
        token = issue(secret, TokenClaim(slug_of(DeviceId("doctor")), Epoch(0)))
    try:
        status, _ = await _call(session, "POST", settings.advertise + wire.REPORT_PATH, tls, token)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return name, "warn", _why(error), "run doctor again"
    if status in (401, 403):
        what = f"the control plane at {settings.advertise} refuses what {setting} signs or holds (HTTP {status})"
        mend = f"it runs with another {setting}: give both the same, and keep the old key below the new one"
        return name, "fail", what, mend
    return name, "ok", f"the control plane believes what comes from {setting}", ""


async def _status(
    session: aiohttp.ClientSession, settings: Settings, tls: ssl.SSLContext | bool
) -> list[Found]:
    """What the control plane says of itself: how many running agents are refused or silent, and whether its
    registry went back in time."""
    name = "agents heard"
    try:
        token = _operator_token(settings)
    except UserError as error:
        return [(name, "warn", str(error), "run doctor where api.token_file is")]
    try:
        status, said = await _call(session, "GET", f"{settings.advertise}/v1/status", tls, token)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return [(name, "warn", _why(error), "run doctor again")]
    if status != 200 or not isinstance(said.get("unheard"), dict):
        return [(name, "warn", f"the status can't be read (HTTP {status})", "set api.token_file")]
    found = [_unheard(said["unheard"])]
    if restored := said.get("registry_restored"):
        mend = (
            "see docs/runbooks.md, RegistryRestored; a restart of the control plane ends this line"
        )
        found.append(("registry restored", "warn", str(restored), mend))
    return found


def _unheard(counts: dict[str, Any]) -> Found:
    name = "agents heard"
    refused, silent = counts.get("refused", 0), counts.get("silent", 0)
    if not refused and not silent:
        return name, "ok", "every running agent is heard", ""
    what = f"the reports of {refused} running agents are refused, and {silent} are silent"
    mend = (
        "see `devices ls --verdict unwatched` for the reason, and docs/runbooks.md, AgentsUnheard"
    )
    return name, "fail", what, mend
