"""Leases on a real Consul: which replica holds what, and how soon a lease moves when its holder ends."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients.consul import (
    ConsulAccess,
    ConsulClient,
    KvRow,
    TxnConflictError,
    delete_cas,
)
from nomad_watchdog.clients.consul_sessions import ConsulSessions
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import FencedError
from nomad_watchdog.ids import Shard, shard_of
from nomad_watchdog.model import Monotonic
from nomad_watchdog.registry.consul import ConsulRegistry
from nomad_watchdog.replicas.consul_leases import ConsulLeases
from nomad_watchdog.replicas.lease_keys import read_replicas
from nomad_watchdog.replicas.leases import check
from nomad_watchdog.replicas.report_addresses import ReportAddresses
from servers.consul import ConsulServer
from tests.registry.records import record

TTL_S = 2.0


class Clock(SystemClock):
    """The machine's clock, set ahead by the time that a process slept."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> Monotonic:
        return Monotonic(super().monotonic() + self.ahead_s)


class Part:
    """One replica in this process, with its own client, task and clock."""

    def __init__(
        self, consul: ConsulServer, prefix: str, name: str, shards: int, ttl_s: float
    ) -> None:
        self.client = ConsulClient(ConsulAccess(address=consul.http_addr))
        self.clock = Clock()
        self.leases = ConsulLeases(
            self.client,
            prefix=prefix,
            shards=shards,
            replica=f"{name}-{uuid.uuid4().hex[:6]}",
            api="http://127.0.0.1:9",
            clock=self.clock,
            ttl_s=ttl_s,
        )
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.ensure_future(self.leases.run())

    async def fall_silent(self) -> None:
        """Stop the heartbeats."""
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
            self.task = None

    async def crash(self) -> None:
        """End without releasing anything, like a killed process."""
        await self.fall_silent()
        await self.client.close()

    @property
    def held(self) -> set[int]:
        return set(self.leases.terms())


@asynccontextmanager
async def parts(
    consul: ConsulServer, *names: str, shards: int = 1, prefix: str = "", ttl_s: float = TTL_S
) -> AsyncIterator[list[Part]]:
    prefix = prefix or f"t-{uuid.uuid4().hex[:8]}"
    made = [Part(consul, prefix, name, shards, ttl_s) for name in names]
    try:
        yield made
    finally:
        for part in made:
            await part.leases.release()
            await part.crash()


async def until(test: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait until the test is true."""
    deadline = time.monotonic() + timeout_s
    while not test():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.005)


async def test_one_shard_is_plain_leader_election(consul: ConsulServer) -> None:
    """Of three replicas one holds the only shard, and all three report the same holder."""
    async with parts(consul, "a", "b", "c") as three:
        for part in three:
            part.start()
        await until(lambda: sum(len(part.held) for part in three) == 1)
        (holder,) = [part for part in three if part.held]
        await until(
            lambda: all(
                part.leases.all()[0].holder == holder.leases.replica
                and len(part.leases.replicas()) == 3
                for part in three
            )
        )


async def test_a_command_sees_who_runs_without_taking_part(consul: ConsulServer) -> None:
    """`apply` lists the running replicas: none before the first, and none after the last has left."""
    prefix = f"t-{uuid.uuid4().hex[:8]}"
    client = ConsulClient(ConsulAccess(address=consul.http_addr))
    try:
        assert await read_replicas(client, prefix) == []
        async with parts(consul, "a", "b", prefix=prefix) as both:
            for part in both:
                part.start()
            await until(lambda: all(len(part.leases.replicas()) == 2 for part in both))
            found = await read_replicas(client, prefix)
            assert [(one.id, one.api) for one in found] == sorted(
                (part.leases.replica, "http://127.0.0.1:9") for part in both
            )
        assert await read_replicas(client, prefix) == []
    finally:
        await client.close()


async def test_each_knows_what_the_others_are_configured_with(consul: ConsulServer) -> None:
    """Nothing is known before the others know our configuration; a change reaches all; a replica that crashed and comes
    back at its address does not take itself for another one."""
    prefix = f"t-{uuid.uuid4().hex[:8]}"
    async with parts(consul, "a", "b", prefix=prefix, ttl_s=60.0) as (a, b):
        assert a.leases.configs() is None
        await a.leases.announce("c1")
        a.start()
        b.start()
        await until(lambda: (a.leases.configs(), b.leases.configs()) == ([""], ["c1"]))
        await b.leases.announce("c2")
        await until(lambda: (a.leases.configs(), b.leases.configs()) == (["c2"], ["c1"]))
        assert {one.config for one in await read_replicas(a.client, prefix)} == {"c1", "c2"}
        await a.fall_silent()
        async with parts(consul, "a", prefix=prefix, ttl_s=60.0) as (again,):
            again.start()
            await until(lambda: again.leases.configs() is not None)
            assert again.leases.configs() == ["c2"]


async def test_a_graceful_end_hands_over_at_once(consul: ConsulServer) -> None:
    """A lease that is released gets a new holder. The session did not time out, which would take an hour."""
    async with parts(consul, "a", "b", ttl_s=3600.0) as (first, second):
        first.start()
        await until(lambda: first.held == {0})
        before = first.leases.terms()[Shard(0)]
        second.start()
        await until(lambda: len(second.leases.replicas()) == 2)
        assert not second.held
        await first.leases.release()
        assert not first.held
        await until(lambda: second.held == {0})
        assert second.leases.terms()[Shard(0)].number > before.number


async def test_a_crashed_holder_is_replaced_when_its_check_fails(consul: ConsulServer) -> None:
    """A holder that crashes is replaced; its own right had ended before."""
    async with parts(consul, "a", "b") as (first, second):
        first.start()
        await until(lambda: first.held == {0})
        second.start()
        await until(lambda: len(second.leases.replicas()) == 2)
        await first.crash()
        await until(lambda: second.held == {0})
        assert not first.held


async def test_the_addresses_that_agents_are_given_follow_the_replicas(
    consul: ConsulServer,
) -> None:
    """Each replica lists its own address first, then the others'. A replica that ended is no longer listed, and one
    that has lost contact does not guarantee that the list is complete."""
    async with parts(consul, "a", "b") as (first, second):
        assert not first.leases.knows_all_replicas()
        for name, part in (("one", first), ("two", second)):
            part.leases.advertise = f"http://{name}:9670"
            part.start()
        one, two = ReportAddresses(first.leases), ReportAddresses(second.leases)
        await until(
            lambda: one.complete() == two.complete() == {"http://one:9670", "http://two:9670"}
        )
        assert one.addresses() == ("http://one:9670", "http://two:9670")
        assert two.addresses() == ("http://two:9670", "http://one:9670")
        second.leases.changed.clear()
        await first.crash()
        await second.leases.changed.wait()
        await until(lambda: two.complete() == {"http://two:9670"})
        await until(lambda: one.complete() is None)


async def test_a_replica_that_was_silent_for_long_takes_part_again(consul: ConsulServer) -> None:
    """A replica whose check has failed meanwhile gets a new session, and the shard once it is free."""
    async with parts(consul, "a", "b") as (first, second):
        first.start()
        await until(lambda: first.held == {0})
        second.start()
        await first.fall_silent()
        await until(lambda: second.held == {0})
        first.start()
        await until(lambda: len(second.leases.replicas()) == 2)
        await second.leases.release()
        await until(lambda: first.held == {0})


async def test_s2_a_frozen_holder_finds_its_right_gone(consul: ConsulServer) -> None:
    """A holder that slept past its TTL may not act, even before it has contacted Consul."""
    async with parts(consul, "a") as (one,):
        one.start()
        await until(lambda: one.held == {0})
        slug = record("pump").slug
        assert check(one.leases, slug).number > 0
        one.clock.ahead_s = TTL_S  # nothing of it has run meanwhile, as after SIGSTOP and SIGCONT
        with pytest.raises(FencedError):
            check(one.leases, slug)


async def test_s2_a_commit_that_names_a_lost_lease_writes_nothing(consul: ConsulServer) -> None:
    """If two replicas both think they hold a shard, the store itself refuses the one whose lock is gone."""
    prefix = f"t-{uuid.uuid4().hex[:8]}"
    async with parts(consul, "a", "b", prefix=prefix) as (first, second):
        registry = ConsulRegistry(client=first.client, prefix=prefix)
        await registry.initialise()
        first.start()
        await until(lambda: first.held == {0})
        wanted = record("pump")
        guards = first.leases.guards([wanted.slug])
        (stored,) = await registry.commit([wanted], guards)
        assert stored is not None
        second.start()
        await until(lambda: len(second.leases.replicas()) == 2)
        await first.leases.release()
        await until(lambda: second.held == {0})
        with pytest.raises(FencedError) as refused:
            await registry.commit([record("other")], guards)
        assert guards[0].session not in str(refused.value)
        assert list((await registry.read()).records) == [wanted.slug]


async def test_shards_are_spread_and_move_when_replicas_come_and_go(consul: ConsulServer) -> None:
    """Eight shards over one, two and three replicas: balanced each time, each shard with one holder."""
    async with parts(consul, "a", "b", "c", shards=8) as three:

        def spread(*sizes: int) -> Callable[[], bool]:
            def test() -> bool:
                held = [shard for part in three for shard in part.held]
                counts = sorted(len(part.held) for part in three)
                return counts == sorted(sizes) and len(held) == len(set(held)) == 8

            return test

        three[0].start()
        await until(spread(8, 0, 0))
        three[1].start()
        await until(spread(4, 4, 0))
        three[2].start()
        await until(spread(3, 3, 2))
        await three[1].crash()
        await until(spread(4, 4, 0))


async def test_no_shard_is_ever_held_by_two(consul: ConsulServer) -> None:
    """While replicas start and end, no two of them ever claim the same shard."""
    async with parts(consul, "a", "b", "c", shards=4) as three:
        doubled: list[Counter[int]] = []

        async def watch() -> None:
            while True:
                held = Counter(shard for part in three for shard in part.held)
                if held and max(held.values()) > 1:
                    doubled.append(held)
                await asyncio.sleep(0.001)

        watcher = asyncio.ensure_future(watch())
        try:
            for part in three:
                part.start()
            await until(lambda: len({s for part in three for s in part.held}) == 4)
            await three[0].leases.release()
            await until(lambda: len({s for part in three[1:] for s in part.held}) == 4)
            await three[1].crash()
            await until(lambda: len(three[2].held) == 4)
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
        assert not doubled


async def test_replicas_with_other_numbers_of_shards_do_not_mix(consul: ConsulServer) -> None:
    """A replica with another number of shards acquires nothing, and reports the number that the others have."""
    prefix = f"t-{uuid.uuid4().hex[:8]}"
    async with (
        parts(consul, "a", shards=2, prefix=prefix) as (first,),
        parts(consul, "b", shards=3, prefix=prefix) as (second,),
    ):
        first.start()
        await until(lambda: first.held == {0, 1})
        second.start()
        await until(lambda: "shards = 2" in second.leases.problem)
        assert not second.held
        assert first.held == {0, 1}


async def test_a_session_ended_by_hand_is_replaced(consul: ConsulServer) -> None:
    """If the holder's session is destroyed, it takes part again, with a new term."""
    async with parts(consul, "a") as (one,):
        one.start()
        await until(lambda: one.held == {0})
        before = one.leases.terms()[Shard(0)]
        session = one.leases.guards([record("pump").slug])[0].session
        await one.client.call(
            lambda: one.client.library.session.destroy(session), what="a test", needs=""
        )
        await until(lambda: one.held == {0} and one.leases.terms()[Shard(0)] != before)
        assert one.leases.terms()[Shard(0)].number > before.number


async def test_a_replica_whose_key_is_deleted_writes_it_again(consul: ConsulServer) -> None:
    """Otherwise the others would send it no reports, and it would acquire no shard, for as long as it runs."""
    prefix = f"t-{uuid.uuid4().hex[:8]}"
    async with parts(consul, "a", "b", prefix=prefix) as both:
        for part in both:
            part.start()
        await until(lambda: all(len(part.leases.replicas()) == 2 for part in both))
        (key,) = await _key_of(both[0], prefix)
        await both[1].client.txn([delete_cas(key.key, key.index)])
        async with asyncio.timeout(60.0):
            while not await _key_of(both[0], prefix):
                await asyncio.sleep(0.005)
        await until(lambda: all(len(part.leases.replicas()) == 2 for part in both))


async def test_a_replica_that_leaves_writes_its_key_no_more(
    consul: ConsulServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task still runs while it releases its leases, and sees that its key is gone."""
    prefix = f"t-{uuid.uuid4().hex[:8]}"
    async with parts(consul, "a", "b", prefix=prefix) as (a, b):
        for part in (a, b):
            part.start()
        await until(lambda: all(len(part.leases.replicas()) == 2 for part in (a, b)))
        (key,) = await _key_of(a, prefix)
        seen = asyncio.Event()

        async def late(_sessions: ConsulSessions, session: str) -> None:
            assert session == key.session
            await until(lambda: len(a.leases.replicas()) == 1)
            seen.set()

        monkeypatch.setattr(ConsulSessions, "destroy", late)
        await a.leases.release()
        monkeypatch.undo()
        assert seen.is_set()
        assert await _key_of(a, prefix) == []
        assert a.held == set()


async def test_the_key_of_a_replica_that_is_back_is_not_deleted_as_stale(
    consul: ConsulServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One replica finds another one's session ended, and deletes its key when that one already has a new session."""
    prefix = f"t-{uuid.uuid4().hex[:8]}"
    async with parts(consul, "a", "b", prefix=prefix) as (a, b):
        a.start()
        await until(lambda: len(a.leases.replicas()) == 1)
        b.start()
        await until(lambda: len(b.leases.replicas()) == 2)
        (before,) = await _key_of(a, prefix)
        txn, conflict = b.client.txn, asyncio.Event()

        async def late(operations: Sequence[dict[str, Any]]) -> Any:
            monkeypatch.undo()  # only the first call
            while True:
                (now,) = await _key_of(a, prefix)
                if now.session not in {"", before.session}:
                    break
                await asyncio.sleep(0.01)
            try:
                return await txn(operations)
            except TxnConflictError:
                conflict.set()
                raise

        monkeypatch.setattr(b.client, "txn", late)
        await ConsulSessions(a.client).destroy(before.session)
        async with asyncio.timeout(60.0):
            await conflict.wait()
        (after,) = await _key_of(a, prefix)
        assert after.lock_index == before.lock_index + 1  # a key that was deleted starts again at 1


async def _key_of(part: Part, prefix: str) -> list[KvRow]:
    _, rows = await part.client.kv_tree(f"{prefix}/leadership/replicas/{part.leases.replica}")
    return list(rows)


async def test_a_lease_lost_while_it_is_ended_ends_too(consul: ConsulServer) -> None:
    """If the session is found gone exactly when the task is cancelled, the task still ends."""

    class AtOnce(Clock):
        armed: asyncio.Task[None] | None = None

        def monotonic(self) -> Monotonic:
            armed, self.armed = self.armed, None
            if armed is not None:
                armed.cancel()
                raise FencedError("our session is gone from Consul")
            return super().monotonic()

    async with parts(consul, "a") as (one,):
        clock = one.clock = one.leases._clock = AtOnce()
        one.start()
        await until(lambda: one.held == {0})
        clock.armed = task = one.task
        assert task is not None
        await asyncio.wait({task}, timeout=60.0)
        assert task.cancelled()


@pytest.mark.slow_because("a Consul of its own stands still until the leases have ended")
async def test_l3_a_frozen_consul_ends_the_right_and_nothing_else(tmp_path: Path) -> None:
    """While Consul is frozen no replica holds a lease; afterwards one does again."""
    async with ConsulServer(tmp_path / "consul") as own, parts(own, "a", "b") as both:
        for part in both:
            part.start()
        await until(lambda: sum(len(part.held) for part in both) == 1)
        own.pause()
        try:
            await until(lambda: not any(part.held for part in both))
        finally:
            own.resume()
        await until(lambda: sum(len(part.held) for part in both) == 1)


@pytest.mark.slow_because("watches the store for two TTLs")
async def test_beating_writes_nothing(consul: ConsulServer) -> None:
    """Without changes, neither renewals nor passes of the check change the store's index."""
    prefix = f"t-{uuid.uuid4().hex[:8]}"
    async with parts(consul, "a", "b", shards=4, prefix=prefix) as both:
        for part in both:
            part.start()
        await until(lambda: sum(len(part.held) for part in both) == 4)
        await until(lambda: all(len(part.held) == 2 for part in both))
        client = both[0].client
        before, _ = await client.kv_tree(f"{prefix}/leadership/")
        # a read that waits longer than any heartbeat interval, and that nothing ends
        after, _ = await client.kv_tree(f"{prefix}/leadership/", before, 2 * TTL_S)
        assert after == before


def test_guards_name_each_shard_once() -> None:
    """A batch of devices is guarded by the locks of its shards, one per shard."""
    leases = ConsulLeases(
        ConsulClient(ConsulAccess(address="http://127.0.0.1:1")),
        prefix="p",
        shards=2,
        replica="r",
        api="http://127.0.0.1:9",
        clock=SystemClock(),
    )
    slugs = [record(f"pump {n}").slug for n in range(20)]
    guards = leases.guards(slugs)
    assert [guard.key for guard in guards] == [
        f"p/leadership/shards/{n}" for n in sorted({shard_of(slug, 2) for slug in slugs})
    ]
