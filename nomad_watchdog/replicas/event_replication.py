"""One replica tells what happened, for all: the holder of shard 0; the others copy what it told.

Each replica keeps its own events as well (`own=true`). What it alone knows it hands to the teller until it
comes back in what was told. Who becomes the teller reads first what the others have of its predecessor's,
and then tells what happened meanwhile. While nobody holds shard 0 (Consul is away) the last teller goes on:
telling twice does less harm than silence.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from ssl import SSLContext
from typing import Any, Final

import aiohttp
from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.core import event_merge
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.events.log import Event, is_audit
from nomad_watchdog.events.merged_log import MergedLog, event_of
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.replicas.leases import Leases, Replica
from nomad_watchdog.replicas.ownership import is_leader, leader, leader_term

log = logging.getLogger(__name__)

PATH: Final = "/v1/peers/events"
EVENTS: Final = "/v1/events"
LOOK_EVERY_S: Final = 0.1
MAX_PENDING: Final = 2_000
"""Own events that wait for a teller; of more the oldest are only in our own log."""
MOST: Final = 200
"""Events in one message."""
AGAIN_S: Final = 1.0
"""What has not come back in so long is handed over again."""
QUIET_S: Final = 0.3
"""A predecessor that has told nothing for so long is taken to have ended."""
_CALL_S: Final = 2.0
_REST_S: Final = 20.0
"""All pages of one replica, each within `_CALL_S`: what is not read of a predecessor is not told."""
_SILENCE_S: Final = 40.0
"""The stream has an empty line every 15 s."""
_LINE: Final = 1 << 22
_PAGE: Final = 1_000
_CHECKED: Final = 200


class EventReplicator:
    """One replica's part. `token` and `tls` as those of `ReportReplicator`."""

    def __init__(
        self,
        fleet: Fleet,
        told: MergedLog,
        leases: Leases,
        token: Callable[[], str],
        tls: Callable[[], SSLContext | None] = lambda: None,
        certified: str = "",
    ) -> None:
        self._chronicle = fleet.recorder
        self._own = fleet.events.own
        self._told = told
        self._leases = leases
        self._token = token
        self._tls = tls
        self._certified = certified or None
        self._term: int | None = None
        """Of our telling; None while another tells."""
        self._stopped = False
        self._clock = fleet.clock
        self._pending: deque[Event] = deque(maxlen=MAX_PENDING)
        self._news = asyncio.Event()
        self._heard_at = float("-inf")
        self._following: tuple[str, asyncio.Task[None]] | None = None
        self.problem = "nobody tells yet"
        """Why what is told may not have come here; "" = it has."""
        fleet.events.read_from(told.log)
        fleet.events.own.on_add = self._added
        fleet.events.own.on_mark = self._marked
        fleet.views.add_status(self.status)

    def status(self) -> dict[str, object]:
        """For the status: who tells, and why we may be behind."""
        return {"event_feed": {"teller": self._teller(), "problem": self.problem}}

    def _added(self, event: Event) -> None:
        if self._term is not None:
            self._told.tell(event, self._term)
        elif not event_merge.is_shared(event):
            if len(self._pending) == MAX_PENDING:
                # Others make room first: what was changed is told whatever else happens.
                least = (n for n, one in enumerate(self._pending) if not is_audit(one.kind))
                del self._pending[next(least, 0)]
            self._pending.append(event)
            self._news.set()

    def _marked(self, own_seqs: Sequence[int], incident: str) -> None:
        if self._term is not None:
            self._told.mark(own_seqs, incident)

    def take(self, said: Sequence[Mapping[str, Any]]) -> int:
        """As the teller: tell these events of another replica; how many were news. Raises ConflictError
        where another tells, ValueError for what is no event."""
        events = [event_of(one) for one in said]
        term = self._term
        if term is None:
            raise ConflictError("another replica tells the events")
        if any(event.origin == self._own.origin for event in events):
            raise ValueError("an event of this replica can't come from another one")
        return sum(self._told.tell(event, term) for event in events)

    def stop(self) -> None:
        """Tell no more: what was told is sent while the lease is let go of, and a successor reads it."""
        self._stopped, self._term = True, None

    # -- who tells ------------------------------------------------------------------------------

    def _teller(self) -> str:
        if self._stopped:
            return ""
        ours = self._leases.replica
        if is_leader(self._leases):
            return ours
        holder = leader(self._leases)
        return ours if self._term is not None and holder in ("", ours) else holder

    def _peer(self, name: str) -> Replica | None:
        found = (one for one in self._leases.replicas() if one.id == name)
        peer = next(found, None)
        return peer if peer is not None and peer.api.startswith(("http://", "https://")) else None

    async def run(self) -> None:
        """Tell or copy, as the lease says, until cancelled."""
        known = self._told.untold(list(self._own.recent()))
        self._pending.extend(event for event in known if not event_merge.is_shared(event))
        if self._pending:
            self._news.set()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CALL_S, sock_read=_SILENCE_S)
        async with (
            aiohttp.ClientSession(timeout=timeout, read_bufsize=_LINE) as session,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._hand_over(session))
            try:
                while True:
                    await self._look(session, group)
                    await asyncio.sleep(LOOK_EVERY_S)
            finally:
                self._unfollow()

    async def _look(self, session: aiohttp.ClientSession, group: asyncio.TaskGroup) -> None:
        teller = self._teller()
        if teller == self._leases.replica:
            if self._term is None:
                await self._take_over(session)
            return
        self._term = None
        following, task = self._following or ("", None)
        if task is not None and (following != teller or task.done()):
            self._unfollow()
        if self._following is None and (peer := self._peer(teller)) is not None:
            self._following = teller, group.create_task(self._follow(session, peer))
            self._news.set()
        elif self._following is None:
            self.problem = f"{teller or 'nobody'} tells, and can't be asked"

    def _unfollow(self) -> None:
        if self._following is not None:
            self._following[1].cancel()
            self._following = None

    # -- the teller -----------------------------------------------------------------------------

    async def _take_over(self, session: aiohttp.ClientSession) -> None:
        await self._last_words()
        self._unfollow()
        peers = [one for one in self._leases.replicas() if one.id != self._leases.replica]
        logs = await asyncio.gather(*(self._rest(session, one) for one in peers))
        term = leader_term(self._leases)
        if term is None:
            return
        for event in sorted((e for events in logs for e in events), key=lambda event: event.seq):
            self._copy(event)
        # From here on without a pause: what happens now is told by `_added`.
        left = list(self._told.incidents.items())
        for event in self._told.untold(list(self._own.recent())):
            self._told.tell(event, term.number)
        self._term, self.problem = term.number, ""
        self._pending.clear()
        for (_, about), (incident, text) in left:
            _, kind, name = about.split(" ", 2)
            self._chronicle.incidents.close_foreign(kind, name, incident, text)
        log.info("telling events", extra={"term": term.number})

    async def _last_words(self) -> None:
        """Let the stream of the predecessor come to its end, or to rest."""
        began = self._clock.monotonic()
        while self._following is not None and not self._following[1].done():
            now = self._clock.monotonic()
            if now - max(self._heard_at, began) > QUIET_S or now - began > _CALL_S:
                return
            await asyncio.sleep(QUIET_S / 10)

    async def _rest(self, session: aiohttp.ClientSession, peer: Replica) -> list[Event]:
        """What another replica has of what was told, beyond what we have."""
        found: list[Event] = []
        since = self._told.log.last_seq
        try:
            async with asyncio.timeout(_REST_S):
                while len(page := await self._page(session, peer, since)) == _PAGE:
                    found += page
                    since = page[-1].seq
                return found + page
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            log.info("a peer's events are not read", extra={"peer": peer.id, "reason": str(error)})
            return found

    # -- the others -----------------------------------------------------------------------------

    async def _follow(self, session: aiohttp.ClientSession, peer: Replica) -> None:
        """Copy what the teller tells until it ends. Never raises: who tells is looked at again."""
        try:
            await self._agree(session, peer)
            query = {"follow": "true", "since": str(self._told.log.last_seq), "limit": "1000"}
            async with session.get(peer.api + EVENTS, **self._asked(query)) as answer:
                answer.raise_for_status()
                self.problem = ""
                async for line in answer.content:
                    self._heard_at = self._clock.monotonic()
                    if line.strip():
                        self._copy(event_of(loads(line)))
            self.problem = f"{peer.id} has ended its stream"
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            self.problem = f"{peer.id} does not tell: {str(error) or 'no answer in time'}"
            log.warning("told events don't come", extra={"reason": self.problem})
            await asyncio.sleep(AGAIN_S)

    async def _agree(self, session: aiohttp.ClientSession, peer: Replica) -> None:
        """Take back what we told and nobody copied: the new teller tells it anew, or gets it from us."""
        mine = [event.seq for event in self._told.log.recent()][-_CHECKED:]
        if not mine:
            return
        page = await self._page(session, peer, mine[0] - 1)
        upto = page[-1].seq if len(page) == _PAGE else mine[-1]
        alone = self._told.take_back(mine[0] - 1, frozenset(e.seq for e in page), upto)
        if alone:
            # older than all that waits already
            waiting = [event for event in self._pending if event.seq > alone[-1].seq]
            self._pending = deque([*alone, *waiting], maxlen=MAX_PENDING)
            self._news.set()

    async def _page(self, session: aiohttp.ClientSession, peer: Replica, since: int) -> list[Event]:
        query = {"since": str(since), "limit": str(_PAGE)}
        async with (
            asyncio.timeout(_CALL_S),
            session.get(peer.api + EVENTS, **self._asked(query)) as answer,
        ):
            answer.raise_for_status()
            return [event_of(one) for one in (await answer.json())["items"]]

    def _copy(self, event: Event) -> None:
        if not self._told.copy(event):
            return
        if event.origin == self._own.origin:
            self._forget(event.own_seq)
        if event.kind.startswith("incident.") and event.data.get("kind"):
            over = event.kind == "incident.closed"
            kind, group = str(event.data["kind"]), str(event.data.get("group"))
            self._chronicle.incidents.adopt(kind, group, "" if over else event.incident)

    def _forget(self, upto: int) -> None:
        """Of what waits for the teller: all up to this number of ours is told."""
        while self._pending and self._pending[0].seq <= upto:
            self._pending.popleft()

    async def _hand_over(self, session: aiohttp.ClientSession) -> None:
        """Hand what we alone know to the teller, until we have read it there."""
        while True:
            await self._news.wait()
            self._news.clear()
            peer = self._peer(self._teller()) if self._term is None else None
            if not self._pending or peer is None:
                continue
            # As of now: what is told back while we still hand it over is pending no more.
            before = self._pending[0].seq
            sent = list(islice(self._pending, MOST))
            body = {"events": [event.shown() for event in sent]}
            try:
                async with (
                    asyncio.timeout(_CALL_S),
                    session.post(peer.api + PATH, json=body, **self._asked({})) as answer,
                ):
                    answer.raise_for_status()
                    if (await answer.json())["taken"] == 0:
                        # told before, by an earlier run of ours: nobody will tell them back
                        self._forget(sent[-1].seq)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
                log.info("events not handed over", extra={"reason": str(error) or "time-out"})
            for _ in range(20):
                if not self._pending or self._pending[0].seq != before:
                    break
                await asyncio.sleep(AGAIN_S / 20)
            if self._pending:
                self._news.set()

    def _asked(self, query: Mapping[str, str]) -> dict[str, Any]:
        token = self._token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        params = {**query, "marks": "true"} if query else None
        return {
            "headers": headers,
            "ssl": self._tls() or True,
            "server_hostname": self._certified,
            "params": params,
        }
