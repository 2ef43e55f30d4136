"""Requirements for every store, tested unchanged over SQLite and over a real Consul.

Out of scope here: failures that only one of them can have (test_sqlite.py, test_consul.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import cast

import pytest

from nomad_watchdog.errors import UserError
from nomad_watchdog.model import DeviceRecord, Epoch, Presence
from nomad_watchdog.registry import Registry, RegistrySnapshot
from tests.registry.conftest import Store
from tests.registry.records import hostile_ids, record


async def put(registry: Registry, wanted: DeviceRecord) -> DeviceRecord:
    (stored,) = await registry.commit([wanted])
    assert stored is not None
    return stored


@asynccontextmanager
async def watching(
    registry: Registry, index: int
) -> AsyncIterator[AsyncIterator[RegistrySnapshot]]:
    """A watch that is closed at the end."""
    watch = cast("AsyncGenerator[RegistrySnapshot, None]", registry.watch(index))
    async with aclosing(watch):
        yield watch


async def following(watch: AsyncIterator[RegistrySnapshot], index: int) -> RegistrySnapshot:
    """The first snapshot at or after index, within a deadline."""
    async with asyncio.timeout(10):
        async for snapshot in watch:
            if snapshot.index >= index:
                return snapshot
    raise AssertionError("the watch ended")


async def test_commit_creates_updates_and_refuses_stale(registry: Registry) -> None:
    """An index of 0 creates once, the current index updates, and any other one changes nothing."""
    first = await put(registry, record("cam 1"))
    assert first.index > 0
    assert await registry.commit([record("cam 1")]) == [None]
    second = await put(registry, replace(first, epoch=Epoch(1)))
    assert second.index > first.index
    assert await registry.commit([replace(first, epoch=Epoch(9))]) == [None]
    assert await registry.commit([record("never seen", index=second.index)]) == [None]
    assert await registry.get(first.slug) == second
    assert (await registry.read()).records == {first.slug: second}


async def test_commit_items_are_independent(registry: Registry) -> None:
    """In 150 records, more than one transaction, losers in the middle do not affect the winners."""
    taken = [await put(registry, record(f"dev {i}")) for i in (0, 70, 149)]
    wanted = [record(f"dev {i}", epoch=3) for i in range(150)]
    stored = await registry.commit(wanted)
    assert [i for i, one in enumerate(stored) if one is None] == [0, 70, 149]
    records = (await registry.read()).records
    assert len(records) == 150
    assert all(records[one.slug] == one for one in taken)
    assert all(records[one.slug] == one for one in stored if one is not None)


async def test_commit_of_nothing_is_nothing(registry: Registry) -> None:
    """An empty commit returns an empty result."""
    assert list(await registry.commit([])) == []


async def test_s1_epoch_survives_delete_and_re_add(registry: Registry) -> None:
    """A tombstone keeps the epoch, and creating the device again without reading it is refused."""
    stored = await put(registry, record("cam", epoch=7))
    gone = await put(registry, replace(stored, presence=Presence.ABSENT))
    assert await registry.commit([record("cam")]) == [None]
    kept = await registry.get(stored.slug)
    assert kept is not None
    assert (kept.epoch, kept.presence) == (7, Presence.ABSENT)
    back = await put(registry, replace(gone, presence=Presence.PRESENT, epoch=Epoch(8)))
    assert (await registry.read()).records[stored.slug].epoch == back.epoch == 8


async def test_s2_two_writers_lose_no_update(store: Store, registry: Registry) -> None:
    """Two handles that race with 100 increments each end at exactly 200."""
    start = await put(registry, record("contended"))

    async def add(handle: Registry) -> None:
        done = 0
        while done < 100:
            now = await handle.get(start.slug)
            assert now is not None
            (stored,) = await handle.commit([replace(now, epoch=Epoch(now.epoch + 1))])
            done += stored is not None

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(add(store.open()))
        group.create_task(add(store.open()))
    end = await registry.get(start.slug)
    assert end is not None
    assert end.epoch == 200


async def test_without_sentinel_everything_is_refused(store: Store) -> None:
    """A store that was never initialised raises UserError with the fix, never returns an empty snapshot."""
    opened = store.open()
    calls: list[Callable[[], Awaitable[object]]] = [
        opened.read,
        opened.installation,
        lambda: opened.get(record("x").slug),
        lambda: opened.commit([record("x")]),
        lambda: anext(aiter(opened.watch(0))),
    ]
    for call in calls:
        with pytest.raises(UserError, match="nomad-watchdog init"):
            await call()


async def test_initialise_is_idempotent(store: Store) -> None:
    """Two simultaneous initialisations, and a third later, get one installation ID."""
    one, two = store.open(), store.open()
    ids = set(await asyncio.gather(one.initialise(), two.initialise()))
    ids |= {await store.open().initialise(), await one.installation()}
    assert len(ids) == 1
    assert (await one.read()).records == {}


async def test_watch_sees_the_other_writer(store: Store, registry: Registry) -> None:
    """A commit through one handle reaches a watch on another, and no snapshot is repeated."""
    other = store.open()
    async with watching(registry, (await registry.read()).index) as watch:
        stored = await put(other, record("late"))
        seen = await following(watch, stored.index)
        assert seen.records == {stored.slug: stored}
        changed = await put(other, replace(stored, epoch=Epoch(1)))
        again = await following(watch, changed.index)
        assert again.index > seen.index
        assert again.records == {stored.slug: changed}


async def test_unchanged_records_are_the_same_objects(registry: Registry) -> None:
    """From one snapshot to the next, only changed records are new objects."""
    still = await put(registry, record("still"))
    moving = await put(registry, record("moving"))
    before = await registry.read()
    async with watching(registry, before.index) as watch:
        moved = await put(registry, replace(moving, epoch=Epoch(1)))
        after = await following(watch, moved.index)
    assert after.records[still.slug] is before.records[still.slug]
    assert after.records[moving.slug] == moved
    assert (await registry.read()).records[still.slug] is before.records[still.slug]


async def test_watch_from_another_history_starts_over(registry: Registry) -> None:
    """An index from the future, as after a restored backup, soon gives a full snapshot."""
    stored = await put(registry, record("restored"))
    async with watching(registry, 10**12) as watch, asyncio.timeout(10):
        snapshot = await anext(watch)
    assert snapshot.records == {stored.slug: stored}


async def test_s8_a_read_shows_our_own_write(registry: Registry) -> None:
    """The index of a read after a commit is not below the index of that commit."""
    for i in range(20):
        stored = await put(registry, record(f"own {i}"))
        snapshot = await registry.read()
        assert snapshot.index >= stored.index
        assert snapshot.records[stored.slug] == stored


async def test_s11_hostile_ids_round_trip(registry: Registry) -> None:
    """1,000 hostile device IDs are returned unchanged, each under its own slug."""
    wanted = [record(text) for text in hostile_ids(1000)]
    stored = await registry.commit(wanted)
    records = (await registry.read()).records
    assert [one.device.id for one in records.values() if one not in stored] == []
    assert {one.device.id for one in records.values()} == {one.device.id for one in wanted}
    assert registry.poisoned == {}


async def test_bulk_of_5000(registry: Registry) -> None:
    """5,000 records are stored and read within a minute, and a second read decodes none."""
    wanted = [record(f"bulk {i}") for i in range(5000)]
    async with asyncio.timeout(60):
        stored = await registry.commit(wanted)
        before = await registry.read()
        after = await registry.read()
    assert None not in stored
    assert len(before.records) == 5000
    assert all(after.records[slug] is one for slug, one in before.records.items())


async def test_many_commits_at_once(registry: Registry) -> None:
    """200 concurrent commits are all stored, each with the index of its own record."""
    answers = await asyncio.gather(*(registry.commit([record(f"c {i}")]) for i in range(200)))
    records = (await registry.read()).records
    assert len(records) == 200
    assert all(one is not None and records[one.slug] == one for (one,) in answers)


async def test_forget_deletes_only_what_has_not_changed(registry: Registry) -> None:
    """A record is deleted only if its index has not changed. The index of the store goes up, and the same ID may be
    registered again."""
    first = await put(registry, record("cam 1"))
    other = await put(registry, record("cam 2"))
    before = (await registry.read()).index
    assert await registry.forget([replace(first, index=first.index + 99), other]) == [False, True]
    snapshot = await registry.read()
    assert snapshot.records == {first.slug: first}
    assert snapshot.index > before
    assert await registry.get(other.slug) is None
    assert await registry.forget([other]) == [True]
    assert await registry.commit([other]) == [None]
    again = await put(registry, record("cam 2"))
    assert again.index > other.index
    assert await registry.forget([]) in ((), [])
