"""Many rows in few statements have the same result as one by one."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Device, DeviceRecord, Epoch, Presence, WallTime
from nomad_watchdog.registry import _sqlite_rows
from nomad_watchdog.registry.sqlite import SqliteRegistry

rows = st.lists(
    st.tuples(
        st.integers(0, 40).map(lambda n: f"d{n}"),
        st.one_of(st.just(0), st.integers(1, 60)),
        st.binary(min_size=1, max_size=4),
    ),
    max_size=90,
)


def by_hand(known: dict[str, tuple[int, bytes]], some: list, index: int) -> list[int | None]:
    done: list[int | None] = []
    for slug, expected, body in some:
        if known.get(slug, (0, b""))[0] == expected:
            index += 1
            known[slug] = (index, body)
            done.append(index)
        else:
            done.append(None)
    return done


@settings(max_examples=150, deadline=None)
@given(rows, rows, st.integers(0, 40))
def test_a_batch_does_what_its_rows_do_one_by_one(first: list, second: list, ready: int) -> None:
    """Whether rows are new, known, lost or repeated: the same indexes, the same winners, the same table, also for long
    runs in which all win."""
    first = [*[(f"d{n}", 0, b"x") for n in range(ready)], *first]
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute(
        "CREATE TABLE device (slug TEXT PRIMARY KEY, idx INTEGER NOT NULL, body BLOB NOT NULL)"
    )
    known: dict[str, tuple[int, bytes]] = {}
    index = 0
    updates = [
        (slug, number, b"y") for slug, number, _ in ((f"d{n}", n + 1, 0) for n in range(ready))
    ]
    for some in (first, updates, second):
        db.execute("BEGIN")
        found = _sqlite_rows.write(db, some, index)
        db.execute("COMMIT")
        assert found == by_hand(known, some, index)
        index += sum(one is not None for one in found)
        assert known == {s: (i, b) for s, i, b in db.execute("SELECT * FROM device")}
    db.close()


def record(name: str) -> DeviceRecord:
    device = Device(DeviceId(name), "default", "10.0.0.1")
    return DeviceRecord(
        slug_of(device.id), device, Presence.PRESENT, 1, Epoch(0), "", WallTime(1.0)
    )


async def test_a_commit_that_nobody_waits_for_harms_no_other(tmp_path: Path) -> None:
    """Of 200 concurrent commits every third is cancelled: each other one is stored and answered with its own index, and
    the registry keeps working."""
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    try:
        tasks = [asyncio.ensure_future(registry.commit([record(f"d{n}")])) for n in range(200)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        kept = [one[0] for number, one in enumerate(done) if number % 3 and isinstance(one, list)]
        assert len(kept) == 133
        assert all(one is not None for one in kept)
        assert len({one.index for one in kept if one is not None}) == 133
        stored = (await registry.read()).records
        assert all(stored[one.slug].index == one.index for one in kept if one is not None)
        (last,) = await registry.commit([record("after")])
        assert last is not None
    finally:
        await registry.close()
