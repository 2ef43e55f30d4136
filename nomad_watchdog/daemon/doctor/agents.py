"""Checks whether the reports of running agents arrive, by calling the agents directly."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import islice
from typing import Final

import aiohttp
from watchdog_agent.runtime.parsing import loads
from yarl import URL

from nomad_watchdog.daemon.doctor.base import Check, CheckStatus

MAX_ASKED: Final = 64
"""Agents that are called."""
_AT_ONCE: Final = 16
_TIMEOUT_S: Final = 2.0
_MAX_BYTES: Final = 256 * 1024
_MAX_NAMED: Final = 3
_NAME: Final = "agents asked"


async def checks(agents: Mapping[str, str], *, runs: bool) -> list[Check]:
    """One check; none without an agent. `agents`: `host:port` of an agent → its device, the most important first.
    `runs`: a control plane answers, so an agent that can't reach it is a failure."""
    asked = dict(islice(agents.items(), MAX_ASKED))
    if not asked:
        return []
    room = asyncio.Semaphore(_AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:

        async def one(listen: str) -> str | None:
            async with room:
                return await _trouble(session, listen)

        answers = await asyncio.gather(*map(one, asked))
    answered = [(d, t) for d, t in zip(asked.values(), answers, strict=True) if t is not None]
    counted = f"{len(answered)} of {len(asked)} agents answer here"
    troubled = sorted((device, trouble) for device, trouble in answered if trouble)
    if not troubled:
        return [
            Check(
                _NAME,
                CheckStatus.OK,
                f"{counted}; their reports arrive" if answered else counted,
                "",
            )
        ]
    named = "; ".join(f"{device}: {trouble}" for device, trouble in troubled[:_MAX_NAMED])
    more = f" and {len(troubled) - _MAX_NAMED} more" if len(troubled) > _MAX_NAMED else ""
    what = f"{counted}; the reports of {len(troubled)} of them do not arrive: {named}{more}"
    fix = "see docs/runbooks.md, AgentsUnheard" if runs else "run doctor again while it runs"
    return [Check(_NAME, CheckStatus.FAIL if runs else CheckStatus.WARN, what, fix)]


async def _trouble(session: aiohttp.ClientSession, listen: str) -> str | None:
    """The agent's reason why its reports do not arrive; "" = they do, None = it does not answer here. No token is
    sent: the address comes from a report and is not verified."""
    host, _, port = listen.rpartition(":")
    try:
        number = int(port) if len(port) <= 5 else 0
        url = URL.build(scheme="http", host=host.strip("[]"), port=number, path="/status")
        async with session.get(url, allow_redirects=False) as answer:
            body = b""
            while len(body) < _MAX_BYTES and (chunk := await answer.content.read(_MAX_BYTES)):
                body += chunk
            trouble = str(loads(body)["reports"]["trouble"])
    except (
        aiohttp.ClientError,
        TimeoutError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):
        return None
    return trouble[:300]
