"""The leader publishes the events of all replicas, and the others copy its log.

Each replica also keeps its own events (`own=true`). It sends those that it alone knows to the leader until it has
copied them from the leader's log. A new leader first reads what the others have copied from its predecessor, and then
publishes what happened since. While no replica is the leader because Consul is not available, the last one goes on:
an event that is published twice does less harm than a missing one.
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
from aiohttp.http_exceptions import LineTooLong
from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.core import event_merge
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.events.log import Event, is_audit
from nomad_watchdog.events.merged_log import MergedLog, event_of
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.replicas.leases import Leases, Replica, may_be_called
from nomad_watchdog.replicas.ownership import is_leader, leader, leader_term

log = logging.getLogger(__name__)

PATH: Final = "/v1/peers/events"
EVENTS: Final = "/v1/events"
CHECK_EVERY_S: Final = 0.1
MAX_PENDING: Final = 2_000
"""Maximum number of own events that wait for a publisher; of more, the oldest are only in our own log."""
MAX_BATCH: Final = 200
"""Maximum number of events in one message."""
AGAIN_S: Final = 1.0
"""Events that were not copied back within this time are sent again."""
QUIET_S: Final = 0.3
"""A predecessor that published nothing for this time is assumed to have ended."""
_CALL_S: Final = 2.0
_REST_S: Final = 20.0
"""Timeout for all pages of one replica. What is not read of a predecessor is lost."""
_SILENCE_S: Final = 40.0
"""The stream has an empty line every 15 s."""
_LINE: Final = 1 << 22
_PAGE: Final = 1_000
_MAX_ANSWER: Final = 1 << 25
"""Bytes of a page: one event has some 10 KB at most."""
_CHECKED: Final = 200


class EventReplicator:
    """Publishes or copies events for one replica. `token` and `tls`: as for `ReportReplicator`."""

    def __init__(
        self,
        fleet: Fleet,
        merged: MergedLog,
        leases: Leases,
        token: Callable[[], str],
        tls: Callable[[], SSLContext | None] = lambda: None,
        certified: str = "",
    ) -> None:
        self._recorder = fleet.recorder
        self._own = fleet.events.own
        self._merged = merged
        self._leases = leases
        self._token = token
        self._tls = tls
        self._certified = certified or None
        self._term: int | None = None
        """In which we publish; None while another replica does."""
        self._stopped = False
        self._clock = fleet.clock
        self._pending: deque[Event] = deque(maxlen=MAX_PENDING)
        self._news = asyncio.Event()
        self._received_at = float("-inf")
        self._following: tuple[str, asyncio.Task[None]] | None = None
        self.problem = "no replica publishes events yet"
        """Why the log here may be behind; "" = it is not."""
        fleet.events.read_from(merged.log)
        fleet.events.own.added.connect(self._on_added)
        fleet.events.own.marked.connect(self._on_marked)
        fleet.views.add_status(self.status)

    def status(self) -> dict[str, object]:
        """For the status: which replica publishes, and why we may be behind."""
        return {"event_feed": {"teller": self._publisher(), "problem": self.problem}}

    def _on_added(self, event: Event) -> None:
        if self._term is not None:
            self._merged.publish(event, self._term)
        elif not event_merge.is_shared(event):
            if len(self._pending) == MAX_PENDING:
                # Other events are dropped first: every audit event is published.
                least = (n for n, one in enumerate(self._pending) if not is_audit(one.kind))
                del self._pending[next(least, 0)]
            self._pending.append(event)
            self._news.set()

    def _on_marked(self, own_seqs: Sequence[int], incident: str) -> None:
        if self._term is not None:
            self._merged.mark(own_seqs, incident)

    def publish_of_peer(self, items: Sequence[Mapping[str, Any]]) -> int:
        """Publish these events of another replica; how many were new. Raises ConflictError where another replica
        publishes, ValueError for what is not an event."""
        events = [event_of(one) for one in items]
        term = self._term
        if term is None:
            raise ConflictError("another replica publishes the events")
        if any(event.origin == self._own.origin for event in events):
            raise ValueError("an event of this replica can't come from another one")
        return sum(self._merged.publish(event, term) for event in events)

    def stop(self) -> None:
        """Publish no more. What was published is sent while the lease is released, and a successor reads it."""
        self._stopped, self._term = True, None

    # -- who publishes ------------------------------------------------------------------------------

    def _publisher(self) -> str:
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
        return peer if peer is not None and may_be_called(peer, self._tls()) else None

    async def run(self) -> None:
        """Publish or copy, depending on the lease, until cancelled."""
        known = self._merged.unpublished(list(self._own.recent()))
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
                    await self._check(session, group)
                    await asyncio.sleep(CHECK_EVERY_S)
            finally:
                self._unfollow()

    async def _check(self, session: aiohttp.ClientSession, group: asyncio.TaskGroup) -> None:
        publisher = self._publisher()
        if publisher == self._leases.replica:
            if self._term is None:
                await self._start_publishing(session)
            return
        self._term = None
        following, task = self._following or ("", None)
        if task is not None and (following != publisher or task.done()):
            self._unfollow()
        if self._following is None and (peer := self._peer(publisher)) is not None:
            self._following = publisher, group.create_task(self._copy_from(session, peer))
            self._news.set()
        elif self._following is None:
            self.problem = f"{publisher or 'no replica'} publishes, and its address is not known"

    def _unfollow(self) -> None:
        if self._following is not None:
            self._following[1].cancel()
            self._following = None

    # -- as the publisher -----------------------------------------------------------------------------

    async def _start_publishing(self, session: aiohttp.ClientSession) -> None:
        await self._finish_copying()
        self._unfollow()
        others = (one for one in self._leases.replicas() if one.id != self._leases.replica)
        peers = [one for one in others if may_be_called(one, self._tls())]
        logs = await asyncio.gather(*(self._read_rest(session, one) for one in peers))
        term = leader_term(self._leases)
        if term is None:
            return
        for event in sorted((e for events in logs for e in events), key=lambda event: event.seq):
            self._copy(event)
        # No await from here on: what happens from now on is published by `_on_added`.
        left = list(self._merged.incidents.items())
        for event in self._merged.unpublished(list(self._own.recent())):
            self._merged.publish(event, term.number)
        self._term, self.problem = term.number, ""
        self._pending.clear()
        for (_, about), (incident, text) in left:
            _, kind, name = about.split(" ", 2)
            self._recorder.incidents.close_foreign(kind, name, incident, text)
        log.info("publishing events", extra={"term": term.number})

    async def _finish_copying(self) -> None:
        """Wait until the stream of the predecessor ends, or stays quiet."""
        began = self._clock.monotonic()
        while self._following is not None and not self._following[1].done():
            now = self._clock.monotonic()
            if now - max(self._received_at, began) > QUIET_S or now - began > _CALL_S:
                return
            await asyncio.sleep(QUIET_S / 10)

    async def _read_rest(self, session: aiohttp.ClientSession, peer: Replica) -> list[Event]:
        """The published events that another replica has and we do not."""
        found: list[Event] = []
        since = self._merged.log.last_seq
        try:
            async with asyncio.timeout(_REST_S):
                while len(page := await self._page(session, peer, since)) == _PAGE:
                    found += page
                    since = page[-1].seq
                return found + page
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            log.info("events of a peer not read", extra={"peer": peer.id, "reason": str(error)})
            return found

    # -- as another replica -----------------------------------------------------------------------------

    async def _copy_from(self, session: aiohttp.ClientSession, peer: Replica) -> None:
        """Copy the log of the publisher until its stream ends. Never raises: the publisher is checked again."""
        try:
            await self._reconcile(session, peer)
            query = {"follow": "true", "since": str(self._merged.log.last_seq), "limit": "1000"}
            async with session.get(peer.api + EVENTS, **self._request(query)) as answer:
                answer.raise_for_status()
                self.problem = ""
                async for line in answer.content:
                    self._received_at = self._clock.monotonic()
                    if line.strip():
                        self._copy(event_of(loads(line)))
            self.problem = f"{peer.id} has ended its stream"
        except (aiohttp.ClientError, LineTooLong, TimeoutError, ValueError, KeyError) as error:
            self.problem = f"{peer.id} sends no events: {str(error) or 'no answer in time'}"
            log.warning("events not copied", extra={"reason": self.problem})
            await asyncio.sleep(AGAIN_S)

    async def _reconcile(self, session: aiohttp.ClientSession, peer: Replica) -> None:
        """Withdraw what we published and no replica copied: the new publisher publishes it again, or gets it from us."""
        mine = [event.seq for event in self._merged.log.recent()][-_CHECKED:]
        if not mine:
            return
        page = await self._page(session, peer, mine[0] - 1)
        last = page[-1].seq if len(page) == _PAGE else mine[-1]
        alone = self._merged.withdraw(mine[0] - 1, frozenset(e.seq for e in page), last)
        if alone:
            # older than all that waits already
            waiting = [event for event in self._pending if event.seq > alone[-1].seq]
            self._pending = deque([*alone, *waiting], maxlen=MAX_PENDING)
            self._news.set()

    async def _page(self, session: aiohttp.ClientSession, peer: Replica, since: int) -> list[Event]:
        query = {"since": str(since), "limit": str(_PAGE)}
        async with (
            asyncio.timeout(_CALL_S),
            session.get(peer.api + EVENTS, **self._request(query)) as answer,
        ):
            answer.raise_for_status()
            items = (await _fields(answer))["items"]
            if not isinstance(items, list):
                raise ValueError("it sends no list of events")  # noqa: TRY004  # as any other answer
            return [event_of(one) for one in items]

    def _copy(self, event: Event) -> None:
        if not self._merged.copy(event):
            return
        if event.origin == self._own.origin:
            self._remove_published(event.own_seq)
        if event.kind.startswith("incident.") and event.data.get("kind"):
            over = event.kind == "incident.closed"
            kind, group = str(event.data["kind"]), str(event.data.get("group"))
            self._recorder.incidents.adopt(kind, group, "" if over else event.incident)

    def _remove_published(self, last: int) -> None:
        """All of our events up to this number were published."""
        while self._pending and self._pending[0].seq <= last:
            self._pending.popleft()

    async def _hand_over(self, session: aiohttp.ClientSession) -> None:
        """Send the events that we alone know to the publisher, until we have copied them from there."""
        while True:
            await self._news.wait()
            self._news.clear()
            peer = self._peer(self._publisher()) if self._term is None else None
            if not self._pending or peer is None:
                continue
            # As of now: an event that is copied back while we still send it is no longer pending.
            before = self._pending[0].seq
            sent = list(islice(self._pending, MAX_BATCH))
            body = {"events": [event.shown() for event in sent]}
            try:
                async with (
                    asyncio.timeout(_CALL_S),
                    session.post(peer.api + PATH, json=body, **self._request({})) as answer,
                ):
                    answer.raise_for_status()
                    if (await _fields(answer))["taken"] == 0:
                        # published earlier, in an earlier run of ours: they will not be copied back
                        self._remove_published(sent[-1].seq)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
                log.info("events not sent", extra={"reason": str(error) or "time-out"})
            for _ in range(20):
                if not self._pending or self._pending[0].seq != before:
                    break
                await asyncio.sleep(AGAIN_S / 20)
            if self._pending:
                self._news.set()

    def _request(self, query: Mapping[str, str]) -> dict[str, Any]:
        token = self._token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        params = {**query, "marks": "true"} if query else None
        return {
            "headers": headers,
            "ssl": self._tls() or True,
            "server_hostname": self._certified,
            "allow_redirects": False,
            "params": params,
        }


async def _fields(answer: aiohttp.ClientResponse) -> Mapping[str, Any]:
    """The object that a replica answered. Raises ValueError if it is none, or longer than _MAX_ANSWER."""
    body = bytearray()
    async for some in answer.content.iter_any():
        body += some
        if len(body) > _MAX_ANSWER:
            raise ValueError(f"its answer is longer than {_MAX_ANSWER} bytes")
    found = loads(body)
    if not isinstance(found, dict):
        raise ValueError("its answer is no JSON object")  # noqa: TRY004  # as any other answer
    return found
