"""What running agents say about their own reports: doctor asks them directly."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import islice
from typing import Final

import aiohttp
from watchdog_agent.runtime.parsing import loads
from yarl import URL

Found = tuple[str, str, str, str]
"""Name, status (ok, warn, fail), what was found, and how to fix it."""

MAX_ASKED: Final = 64
_AT_ONCE: Final = 16
_TIMEOUT_S: Final = 2.0
_MAX_BYTES: Final = 256 * 1024
_MAX_NAMED: Final = 3
_NAME: Final = "agents asked"


async def checks(agents: Mapping[str, str], *, runs: bool) -> list[Found]:
    """One finding; none without an agent. `agents`: `host:port` of an agent → its device, those of most interest
    first. `runs`: a control plane answers, so that an agent that can't reach it is a failure."""
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
    said = [(d, t) for d, t in zip(asked.values(), answers, strict=True) if t is not None]
    counted = f"{len(said)} of {len(asked)} agents answer here"
    troubled = sorted((device, trouble) for device, trouble in said if trouble)
    if not troubled:
        return [(_NAME, "ok", f"{counted}; their reports arrive" if said else counted, "")]
    named = "; ".join(f"{device}: {trouble}" for device, trouble in troubled[:_MAX_NAMED])
    more = f" and {len(troubled) - _MAX_NAMED} more" if len(troubled) > _MAX_NAMED else ""
    what = f"{counted}; the reports of {len(troubled)} of them do not arrive: {named}{more}"
    mend = "see docs/runbooks.md, AgentsUnheard" if runs else "run doctor again while it runs"
    return [(_NAME, "fail" if runs else "warn", what, mend)]


async def _trouble(session: aiohttp.ClientSession, listen: str) -> str | None:
    """Why the reports of an agent do not arrive, in its words; "" = they do, None = it does not answer here. No
    token of ours is sent: the address is what an agent, or whoever speaks for it, has claimed."""
    host, _, port = listen.rpartition(":")
    try:
        number = int(port) if len(port) <= 5 else 0
        url = URL.build(scheme="http", host=host.strip("[]"), port=number, path="/status")
        async with session.get(url, allow_redirects=False) as answer:
            body = b""
            while len(body) < _MAX_BYTES and (chunk := await answer.content.read(_MAX_BYTES)):
                body += chunk
            said = loads(body)["reports"]["trouble"]
    except (
        aiohttp.ClientError,
        TimeoutError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):
        return None
    return str(said)[:300]
