"""Leases as locks in Consul's key-value store, so that any number of replicas share the work (`lease_keys.py`).

The session depends on a TTL check of our own, which is renewed four times per TTL. When a replica dies or freezes, its
check fails and its locks are free at once, without a lock delay: by its own clock its leases ended half a renewal
interval before (`_valid_until`), counted from before the last renewal was sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from nomad_watchdog import __version__
from nomad_watchdog.clients.consul import ConsulClient, KvRow, delete_cas
from nomad_watchdog.clients.consul_sessions import ConsulSessions
from nomad_watchdog.clock import Clock
from nomad_watchdog.core import shard_assignment
from nomad_watchdog.errors import FencedError, WatchdogError
from nomad_watchdog.ids import Shard, Slug, shard_of
from nomad_watchdog.logs import Lasting
from nomad_watchdog.model import Monotonic
from nomad_watchdog.registry import CommitGuard
from nomad_watchdog.replicas.lease_keys import LeaseKeys, LeaseView
from nomad_watchdog.replicas.leases import Lease, Replica, Term

log = logging.getLogger(__name__)

SERVICE: Final = "nomad-watchdog-replica"
"""Name of the service that each control plane registers in Consul, with the address of its API. Not the name of the
job's own service, which Nomad registers."""
TTL_S: Final = 3.0
"""A replica that does not renew within this time loses its leases: about as long as a crash goes unnoticed."""
_RENEWALS: Final = 4
_MARGIN: Final = 1 / 6
"""Part of the TTL by which our leases end before the check can fail."""
_WAIT_S: Final = 5.0
_BACKOFF_MAX_S: Final = 2.0
_UNCLAIMED_TTLS: Final = 2.0
"""Number of TTLs after which any replica acquires a free shard, not only the one that should have it."""
_AT_ONCE: Final = 8
_TXN: Final = 60
_RELEASE_S: Final = 2.0


class ConsulLeases:
    """The leases of one replica. `api`: our address, for peers and for `nomad-watchdog leader`; `advertise`: the
    one that agents get, "" = the same."""

    def __init__(  # noqa: PLR0913  # settings by name
        self,
        client: ConsulClient,
        *,
        prefix: str,
        shards: int,
        replica: str,
        api: str,
        clock: Clock,
        ttl_s: float = TTL_S,
        advertise: str = "",
    ) -> None:
        self.shards = shards
        self.replica = replica
        self.advertise = advertise or api
        self.problem = "not in touch with Consul yet"
        self.changed = asyncio.Event()
        self._client = client
        self._sessions = ConsulSessions(client)
        self._keys = LeaseKeys(prefix)
        self._api = api
        self._clock = clock
        self._ttl_s = ttl_s
        self._check = f"{SERVICE}-{replica}-alive"
        self._config = ""
        self._since = clock.wall()
        self._session = ""
        self._valid_until = Monotonic(0.0)
        self._terms: dict[Shard, Term] = {}
        self._view = LeaseView()
        self._free_since: dict[Shard, Monotonic] = {}
        self._leaving = False
        self._unread = "the leases have not been read yet"
        """Why the leases can't be read; "" = the last read succeeded."""
        self._lost = Lasting(log, "leases lost")
        self._unseen = Lasting(log, "leases can't be read")

    def terms(self) -> Mapping[Shard, Term]:
        return self._terms if self._clock.monotonic() < self._valid_until else {}

    def guards(self, slugs: Collection[Slug]) -> Sequence[CommitGuard]:
        shards = {shard_of(slug, self.shards) for slug in slugs}
        return [CommitGuard(self._keys.shard(shard), self._session) for shard in sorted(shards)]

    def all(self) -> Sequence[Lease]:
        known = self._view.leases
        return [
            known.get(shard, Lease(shard, shard_assignment.NOBODY))
            for shard in map(Shard, range(self.shards))
        ]

    @property
    def current(self) -> bool:
        return not self._unread and self._clock.monotonic() < self._valid_until

    def replicas(self) -> Sequence[Replica]:
        return sorted(self._view.replicas.values(), key=lambda one: one.id)

    def configs(self) -> Sequence[str] | None:
        there = self._view.replicas
        own = there.get(self._session)
        if own is None or own.config != self._config:
            return None
        if self._clock.monotonic() >= self._valid_until:
            return None
        return [
            one.config
            for one in there.values()
            if one is not own and not self._is_our_predecessor(one)
        ]

    def _is_our_predecessor(self, one: Replica) -> bool:
        """Whether this is an earlier run of ours whose session has not ended yet: on the same machine and at the same
        address, where two processes can't listen."""
        return one.api == self._api and _machine(one.id) == _machine(self.replica)

    async def announce(self, config: str) -> None:
        self._config = config
        if self._session:
            with suppress(FencedError):  # a new session publishes it
                await self._try_to_publish(self._session)

    def knows_all_replicas(self) -> bool:
        alive = self._clock.monotonic() < self._valid_until
        return alive and self._session in self._view.replicas

    # -- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        failures = 0
        while not self._leaving:
            began = self._clock.monotonic()
            try:
                # A task of its own, so that our cancellation is seen whatever ends at that moment: up to
                # Python 3.12 the error of a TaskGroup's child takes its place (python/cpython#116720).
                (ended,) = await asyncio.gather(self._keep_session(), return_exceptions=True)
                if ended is not None:
                    raise ended
            except* WatchdogError as group:
                failures = 0 if self._clock.monotonic() - began > self._ttl_s else failures + 1
                self.problem = str(_first(group))
                self._lost.goes_on(self._clock.monotonic(), self.problem)
            await asyncio.sleep(random.uniform(0.05, min(_BACKOFF_MAX_S, 0.2 * 2**failures)))  # noqa: S311
        await asyncio.Event().wait()

    async def _keep_session(self) -> None:
        session = await self._open()
        self._session = session
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._renew(session))
                group.create_task(self._watch(session))
        finally:
            self._end_terms(self._terms.keys())
            self._valid_until = Monotonic(0.0)

    async def _open(self) -> str:
        place = urlsplit(self._api)
        await self._sessions.announce(
            SERVICE,
            f"{SERVICE}-{self.replica}",
            self._check,
            self._ttl_s,
            place=(place.hostname or "", place.port or 80),
        )
        session = await self._sessions.create(self.replica, self._check)
        await self._publish(session)
        return session

    async def _publish(self, session: str) -> None:
        """Write our own key. Raises as `ConsulSessions.lock`."""
        fields = {
            "v": 1,
            "id": self.replica,
            "api": self._api,
            "since": self._since,
            "shards": self.shards,
            "version": __version__,
            "config": self._config,
            "advertise": self.advertise,
        }
        await self._sessions.lock(
            self._keys.replica(self.replica), json.dumps(fields).encode(), session
        )

    async def _try_to_publish(self, session: str) -> None:
        """As `_publish`; raises only FencedError. Until it succeeds, each read of the leases tries again."""
        try:
            await self._publish(session)
        except FencedError:
            raise
        except WatchdogError as error:
            log.debug("key of this replica not written", extra={"reason": str(error)})

    async def _renew(self, session: str) -> None:
        while True:
            began = self._clock.monotonic()
            try:
                async with asyncio.timeout(self._ttl_s):
                    await self._sessions.renew(self._check, session)
            except FencedError:
                raise
            except (WatchdogError, TimeoutError) as error:
                self.problem = str(error) or "Consul does not answer"
                await asyncio.sleep(self._ttl_s / 10)
                continue
            self.problem = self._unread
            self._lost.over(began)
            late = self._clock.monotonic() >= self._valid_until
            self._valid_until = Monotonic(began + self._ttl_s * (1 - _MARGIN))
            if late:
                self.changed.set()
            await asyncio.sleep(self._ttl_s / _RENEWALS)

    async def _watch(self, session: str) -> None:
        index = 0
        while True:
            try:
                index, rows = await self._client.kv_tree(
                    self._keys.folder, index, self._max_wait_s()
                )
            except FencedError:
                raise
            except WatchdogError as error:
                # This does not end our leases: `_renew` decides that.
                self._unseen.goes_on(self._clock.monotonic(), str(error))
                self._unread = str(error)
                self.problem = self.problem or self._unread
                index = 0
                await asyncio.sleep(random.uniform(0.1, 0.5))  # noqa: S311  # jitter
                continue
            self._unseen.over(self._clock.monotonic())
            if self.problem == self._unread:
                self.problem = ""
            self._unread = ""
            self._apply(self._keys.view(rows), session)
            if self._leaving:
                continue  # `release` deletes our key and releases our shards: neither is taken back
            own = self._view.replicas.get(session)
            if own is None or own.config != self._config:
                await self._try_to_publish(session)
            await self._balance(session)

    def _max_wait_s(self) -> float:
        """Shorter while a shard is free: nothing wakes us when any replica may acquire it."""
        return self._ttl_s / 2 if self._free_since else _WAIT_S

    # -- what is seen ---------------------------------------------------------------------------

    def _apply(self, view: LeaseView, session: str) -> None:
        if view.addresses != self._view.addresses:
            self.changed.set()
        self._view = view
        now = self._clock.monotonic()
        held = {} if self._leaving else view.sessions
        mine = {shard for shard, holder in held.items() if holder == session}
        self._end_terms(self._terms.keys() - mine)
        for shard in mine:
            number = view.leases[shard].term
            known = self._terms.get(shard)
            if known is None or known.number != number:
                self._terms[shard] = Term(number, now)
                self.changed.set()
                log.info("lease taken", extra={"shard": shard, "term": number})
        free = {s for s in map(Shard, range(self.shards)) if s not in view.sessions}
        self._free_since = {shard: self._free_since.get(shard, now) for shard in free}

    def _end_terms(self, shards: Iterable[Shard]) -> None:
        for shard in list(shards):
            term = self._terms.pop(shard)
            self.changed.set()
            log.info("lease given up", extra={"shard": shard, "term": term.number})

    async def _balance(self, session: str) -> None:
        others = {one.shards for one in self._view.replicas.values()} - {self.shards}
        if others:
            self.problem = (
                f"other replicas work with shards = {min(others)}, this one with {self.shards}: "
                "give all the same number"
            )
            return
        await self._delete_stale(self._view.stale)
        holders = {lease.shard: lease.holder for lease in self.all()}
        names = {one.id for one in self._view.replicas.values()}
        wanted = shard_assignment.moves(holders, names, self.replica)
        if wanted.give:
            # First the term, then the lock: no action begins under a lock that is being released.
            self._end_terms(set(wanted.give) & self._terms.keys())
            await self._sessions.unlock([self._keys.shard(s) for s in wanted.give[:_TXN]], session)
        now = self._clock.monotonic()
        unclaimed = [
            shard
            for shard, since in self._free_since.items()
            if now - since > _UNCLAIMED_TTLS * self._ttl_s
        ]
        await self._acquire(dict.fromkeys([*wanted.take, *unclaimed]), session)

    async def _acquire(self, shards: Iterable[Shard], session: str) -> None:
        room = asyncio.Semaphore(_AT_ONCE)
        fields = {"v": 1, "replica": self.replica, "since": self._clock.wall()}
        value = json.dumps(fields).encode()

        async def one(shard: Shard) -> None:
            async with room:
                await self._sessions.lock(self._keys.shard(shard), value, session)

        # The watch shows the locks that were acquired, with their terms.
        async with asyncio.TaskGroup() as group:
            for shard in shards:
                group.create_task(one(shard))

    async def _delete_stale(self, rows: Sequence[KvRow]) -> None:
        if not rows:
            return
        try:
            # Only as it was read: its replica may have locked it again, with a new session.
            await self._client.txn([delete_cas(row.key, row.index) for row in rows[:_TXN]])
        except WatchdogError as error:
            log.debug("key of a stale replica not deleted", extra={"reason": str(error)})

    # -- leaving --------------------------------------------------------------------------------

    async def release(self) -> None:
        self._leaving = True
        session, held = self._session, [self._keys.shard(shard) for shard in self._terms]
        self._end_terms(self._terms.keys())
        self._valid_until = Monotonic(0.0)
        if not session:
            return
        try:
            async with asyncio.timeout(_RELEASE_S):
                for first in range(0, len(held) or 1, _TXN):
                    gone = [self._keys.replica(self.replica)] if first == 0 else []
                    await self._sessions.unlock(held[first : first + _TXN], session, delete=gone)
                await self._sessions.destroy(session)
                await self._sessions.retract(f"{SERVICE}-{self.replica}")
        except (WatchdogError, TimeoutError) as error:
            # The check fails soon, and then other replicas acquire them.
            log.warning("leases not released", extra={"reason": str(error) or "no answer in time"})


def _machine(replica: str) -> str:
    """Of a replica's id; a random part comes last."""
    return replica.rpartition("-")[0]


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group
