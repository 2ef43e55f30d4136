"""Sends the reports and heartbeats that one replica receives to the others, so that each knows the whole fleet.

Only accepted reports are sent, and a replica accepts a report from a peer only if its own record has the same epoch and
instance. Nothing is kept for a peer that does not answer: the next report of an agent contains everything again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from ssl import SSLContext
from typing import Any, Final

import aiohttp

from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Report
from nomad_watchdog.replicas.leases import Leases, Replica, may_be_called
from nomad_watchdog.schedulers import agent_zipapp

log = logging.getLogger(__name__)

PATH: Final = "/v1/peers/reports"
MAX_BATCH: Final = 500
"""Maximum number of reports in one message."""
MAX_BEATS: Final = 2_000
"""Maximum number of IDs in one message; both together stay below the API's default limit of 1 MiB per body."""
GATHER_S: Final = 0.1
"""Time for which reports are gathered into one message."""
_CALL_S: Final = 2.0
VIA: Final = "1.1 nomad-watchdog"
"""The header `Via` of a replica that asks another one for a file: that one asks no further (RFC 9110, 7.6.3)."""
MAX_FILE: Final = 8 * 1024 * 1024
"""Bytes of an agent file; ours has less than a tenth of that."""
_MISSED_S: Final = 0.1
"""Minimum time between a search that found nothing and the next one: any client can request any file."""
_MAX_SEARCHES: Final = 32
"""Maximum number of requests that wait for a search; further ones get the answer that there is no such file."""


def document(report: Report) -> dict[str, Any]:
    """A report as it came, in the format of `watchdog_agent.wire`."""
    fields = asdict(report)
    del fields["slug"], fields["received_at"]
    return {"v": 1, **fields}


class ReportReplicator:
    """Sends what one replica receives. `token`: returns the bearer token that replicas share, "" = none; `tls`: the
    trusted CAs and our certificate for https, None = the system's CAs; `certified`: the host name in the others'
    certificates, "" = the one in their address."""

    def __init__(
        self,
        fleet: Fleet,
        leases: Leases,
        token: Callable[[], str],
        tls: Callable[[], SSLContext | None] = lambda: None,
        certified: str = "",
    ) -> None:
        self._leases = leases
        self._token = token
        self._tls = tls
        self._certified = certified or None
        self._fresh: dict[Slug, Report] = {}
        self._news = asyncio.Event()
        self._refusing: set[str] = set()
        self._beats: dict[str, None] = {}
        """IDs of devices that sent a heartbeat here, oldest first."""
        fleet.reports.accepted.connect(self.note)
        fleet.presence.heard.connect(self.note_beats)

    def note(self, report: Report) -> None:
        """Send this report; only the newest one of a device is sent."""
        self._fresh.pop(report.slug, None)
        self._fresh[report.slug] = report
        self._news.set()

    def note_beats(self, ids: Sequence[str]) -> None:
        """Send these heartbeats: only the replica that reconciles a device lets it expire."""
        if ids and self.others():
            self._beats.update(dict.fromkeys(ids))
            self._news.set()

    def others(self) -> list[Replica]:
        return [
            one
            for one in self._leases.replicas()
            if one.id != self._leases.replica and may_be_called(one, self._tls())
        ]

    async def run(self) -> None:
        """Send until cancelled."""
        timeout = aiohttp.ClientTimeout(total=_CALL_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                await self._news.wait()
                await asyncio.sleep(GATHER_S)
                batch = dict(islice(self._fresh.items(), MAX_BATCH))
                for slug in batch:
                    del self._fresh[slug]
                beats = list(islice(self._beats, MAX_BEATS))
                for name in beats:
                    del self._beats[name]
                if not self._fresh and not self._beats:
                    self._news.clear()
                peers = self.others()
                if not peers:
                    continue
                reports = [document(report) for report in batch.values()]
                body = {"reports": reports, "beats": beats}
                async with asyncio.TaskGroup() as group:
                    for peer in peers:
                        group.create_task(self._send(session, peer, body))

    async def _send(
        self, session: aiohttp.ClientSession, peer: Replica, body: Mapping[str, Any]
    ) -> None:
        token = self._token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            async with session.post(
                peer.api + PATH, json=body, headers=headers, ssl=self._tls() or True,
                server_hostname=self._certified, allow_redirects=False,
            ) as answer:  # fmt: skip
                why = "" if answer.status == 200 else f"it answered {answer.status}"
        except (
            aiohttp.ClientError,
            TimeoutError,
            ValueError,
        ) as error:  # or a name that no host can have
            why = str(error) or "no answer in time"
        if why and peer.id not in self._refusing:
            log.warning("peer does not accept reports", extra={"peer": peer.id, "reason": why})
            self._refusing.add(peer.id)
        elif not why:
            self._refusing.discard(peer.id)


class AgentFiles:
    """Fetches agent files of other versions from the replica that has them: a job that one replica wrote names a file
    by its SHA-256, and its agents may fetch it from any replica. `others`: the replicas that are running."""

    def __init__(
        self,
        folder: Path,
        others: Callable[[], Sequence[Replica]],
        tls: Callable[[], SSLContext | None] = lambda: None,
        certified: str = "",
    ) -> None:
        self._folder, self._others = folder, others
        self._tls, self._certified = tls, certified or None
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0

    async def fetch(self, sha256: str) -> None:
        """Fetch the file with this SHA-256, if another replica has it."""
        path = agent_zipapp.published(self._folder, sha256)
        if self._waiting >= _MAX_SEARCHES or not self._others():
            return
        self._waiting += 1
        try:
            async with self._one_at_a_time:
                if not path.exists() and not await self._search(sha256):
                    await asyncio.sleep(_MISSED_S)
        finally:
            self._waiting -= 1

    async def _search(self, sha256: str) -> bool:
        timeout = aiohttp.ClientTimeout(total=_CALL_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for peer in self._others():
                body = await self._ask(session, peer, sha256)
                if body is None:
                    continue
                if await asyncio.to_thread(agent_zipapp.keep, self._folder, sha256, body):
                    return True
                log.warning("agent file of another replica is not used: its SHA-256 differs",
                            extra={"peer": peer.id, "sha256": sha256})  # fmt: skip
        return False

    async def _ask(
        self, session: aiohttp.ClientSession, peer: Replica, sha256: str
    ) -> bytes | None:
        try:
            async with session.get(
                f"{peer.api}/artifacts/{sha256}/watchdog-agent.pyz", headers={"Via": VIA},
                ssl=self._tls() or True, server_hostname=self._certified, allow_redirects=False,
            ) as answer:  # fmt: skip
                if answer.status != 200 or (answer.content_length or 0) > MAX_FILE:
                    return None
                return await answer.content.readexactly(answer.content_length or 0)
        except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            return None
