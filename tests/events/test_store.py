"""Events outlive the process, and a failing disk stops nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nomad_watchdog.events import store as event_store
from nomad_watchdog.events.log import MAX_EVENTS, Event, EventFilter, EventLog
from nomad_watchdog.events.store import RESERVE, EventStore
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import WallTime

DEADLINE_S = 30.0
NOW = time.time()


async def until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds; the store works in its own thread."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # a thread sets it
            await asyncio.sleep(0.01)


@asynccontextmanager
async def opened(path: Path, **options: float | str) -> AsyncIterator[tuple[EventLog, EventStore]]:
    store = EventStore(path, **options)  # type: ignore[arg-type]
    found = await store.open()
    history = EventLog(found.origin, store)
    history.resume(found.seq, found.events)
    try:
        yield history, store
    finally:
        await store.close()


def note(history: EventLog, device: str, kind: str = "verdict.offline", at: float = 0.0) -> Event:
    """Add an event. `at`: seconds from now, so that no event is too old to keep."""
    name = DeviceId(device)
    return history.add(
        at=WallTime(NOW + at),
        kind=kind,
        device_id=name,
        slug=slug_of(name),
        text="t",
        data={"n": 1},
    )


async def test_events_outlive_the_process_and_numbers_go_on(tmp_path: Path) -> None:
    """After a clean end the events still exist with their IDs, the next number follows, and the origin is the file's,
    not the one that the next run proposes."""
    path = tmp_path / "events.db"
    async with opened(path) as (history, _):
        ids = [note(history, f"d{n}").id for n in range(5)]
    async with opened(path, origin="other") as (history, _):
        found, following = await history.page(0, 100)
        assert [event.id for event in found] == ids == [f"local:{n}" for n in range(1, 6)]
        assert found[0].data == {"n": 1}
        assert following == 5
        assert note(history, "d9").id == "local:6"
        assert len(history.of_device(slug_of(DeviceId("d1")))) == 1


CRASHER = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.events.test_store import note, opened

async def main():
    async with opened(Path({path!r})) as (history, store):
        for _ in range(500):
            last = note(history, "d").seq
        while store.waiting:
            await asyncio.sleep(0.01)
        print("stored", last, flush=True)
        while True:
            for _ in range(50):
                last = note(history, "d").seq
            print("given", last, flush=True)
            await asyncio.sleep(0.001)

asyncio.run(main())
"""


async def test_kill_9_loses_nothing_that_was_stored_and_repeats_no_number(tmp_path: Path) -> None:
    """A process killed while writing leaves all that it had stored, and the next run uses none of its numbers again."""
    path = tmp_path / "events.db"
    code = CRASHER.format(tests=str(Path(__file__).parents[2]), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        stored = given = 0
        for line in one.stdout:
            word, number = line.split()
            stored = int(number) if word == "stored" else stored
            given = int(number)
            if stored and given > stored + 200:
                break
        os.kill(one.pid, signal.SIGKILL)
        for line in one.stdout:  # what was in the pipe when it died
            if line.endswith("\n"):
                given = int(line.split()[1])
        one.wait()
    async with opened(path) as (history, _):
        found, _ = await history.page(stored - 1, 1)
        assert [event.seq for event in found] == [stored]
        following = note(history, "after").seq
        assert given < following <= given + RESERVE + 50


async def test_pages_join_what_is_on_disk_with_what_is_in_memory(tmp_path: Path) -> None:
    """More events than memory holds are returned page by page, each once, in order, with and without a filter."""
    count = MAX_EVENTS + 2_500
    async with opened(tmp_path / "events.db") as (history, store):
        for number in range(count):
            note(history, f"d{number % 7}", at=float(number))
        await until(lambda: store.waiting == 0)
        for wanted, share in ((EventFilter(), 1), (EventFilter(device="d3"), 7)):
            since, seqs = 0, []
            while True:
                found, following = await history.page(since, 999, wanted)
                seqs += [event.seq for event in found]
                if len(found) < 999:
                    break
                since = following
            assert seqs == [n for n in range(1, count + 1) if share == 1 or (n - 1) % 7 == 3]
            assert following == count


@pytest.mark.parametrize("in_memory", [True, False])
async def test_filters_mean_the_same_on_disk_and_in_memory(tmp_path: Path, in_memory: bool) -> None:
    """Device, start of kind, verdict and age select the same events on disk and in memory."""
    async with opened(tmp_path / "events.db") as (history, store):
        for kind, device, at in (
            ("verdict.offline", "a", 1.0),
            ("verdict.offline", "b", 2.0),
            ("verdict.watched", "a", 3.0),
            ("plan.start", "a", 4.0),
            ("verdict_x", "a", 5.0),
        ):
            note(history, device, kind, at)
        if not in_memory:
            for _ in range(MAX_EVENTS):
                note(history, "filler", "filler")
            await until(lambda: store.waiting == 0)

        async def seqs(**wanted: str | float) -> list[int]:
            found, _ = await history.page(0, 100, EventFilter(**wanted))  # type: ignore[arg-type]
            return [event.seq for event in found if event.kind != "filler"]

        assert await seqs(device="a") == [1, 3, 4, 5]
        assert await seqs(kind="verdict.") == [1, 2, 3]
        assert await seqs(kind="%") == []
        assert await seqs(verdict="offline") == [1, 2]
        assert await seqs(not_before=NOW + 3.0) == [3, 4, 5]
        assert await seqs(device="a", verdict="offline") == [1]


async def test_the_file_keeps_no_more_than_it_should(tmp_path: Path) -> None:
    """The oldest events are deleted by count and by age, also after a jump of the numbers, and the newest stay."""
    path = tmp_path / "events.db"
    async with opened(path, max_events=1_000, max_age_s=1e12) as (history, store):
        for number in range(5_000):
            note(history, "d", at=float(number))
        await until(lambda: store.waiting == 0)
        history.resume(1_000_000, ())
        note(history, "d", at=5_000.0)
    async with opened(path, max_events=1_000, max_age_s=1e12) as (history, store):
        found, _ = await store.select(0, 2**60, 10_000, EventFilter())
        assert 1_000 <= len(found) <= 1_000 + event_store.ROTATE_EVERY + event_store.GROUP
        assert found[-1].seq == 1_000_001
        note(history, "young", at=8_000.0)
    async with opened(path, max_events=10_000, max_age_s=-5_500.0) as (_, store):
        found, _ = await store.select(0, 2**60, 10_000, EventFilter())
        assert [event.device_id for event in found] == ["young"]


async def test_s9_no_event_keeps_the_others_from_the_disk(tmp_path: Path) -> None:
    """Invalid characters, NUL, and data that is not JSON, is endless or is huge are each written in some form, and so
    are the events after them."""
    endless: dict[str, object] = {}
    endless["self"] = endless
    path = tmp_path / "events.db"
    odd: tuple[dict[object, object], ...] = (
        endless,
        {(1, 2): 3},
        {"x": object()},
        {"x": "y" * 99_999},
    )
    async with opened(path) as (history, store):
        for data in odd:
            history.add(
                at=WallTime(NOW),
                kind="k",
                device_id="a\udcffb\0",
                slug=Slug("s"),
                text="t\ud800" * 2_000,
                data=data,  # type: ignore[arg-type]
            )
        note(history, "after")
        await until(lambda: store.waiting == 0)
    async with opened(path) as (history, _):
        found, _ = await history.page(0, 10)
        assert [event.seq for event in found] == [1, 2, 3, 4, 5]
        assert found[-1].device_id == "after"
        assert all(len(str(event.shown())) < 20_000 for event in found)


async def test_an_incident_is_marked_on_disk(tmp_path: Path) -> None:
    """Events that belong to an incident are still marked after a restart."""
    path = tmp_path / "events.db"
    async with opened(path) as (history, _):
        seqs = [note(history, f"d{n}").seq for n in range(3)]
        history.mark(seqs[:2], "incident-1")
        assert [e.incident for e in history.after(0, 9)[0]] == ["incident-1", "incident-1", ""]
    async with opened(path) as (history, _):
        found, _ = await history.page(0, 9)
        assert [event.incident for event in found] == ["incident-1", "incident-1", ""]


async def test_a_damaged_file_is_set_aside_and_a_new_one_begun(tmp_path: Path) -> None:
    """Garbage in the file costs only its content: events are stored again, under numbers that were never used, and the
    damaged file is kept."""
    path = tmp_path / "events.db"
    async with opened(path) as (history, _):
        note(history, "d")
    path.write_bytes(b"not a database at all" * 500)

    async with opened(path) as (history, store):
        assert store.problem == ""
        first = note(history, "d").seq
        assert first > 1_000_000
        await until(lambda: store.waiting == 0)
    async with opened(path) as (history, _):
        assert [event.seq for event in history.after(0, 9)[0]] == [first]
    assert (tmp_path / "events.db.damaged").exists()


async def test_a_file_that_cannot_be_opened_leaves_memory(tmp_path: Path) -> None:
    """With a file in place of the folder nothing fails: events are in memory, and the reason is reported."""
    (tmp_path / "data").write_text("in the way")
    async with opened(tmp_path / "data" / "events.db") as (history, store):
        seq = note(history, "d").seq
        found, _ = await history.page(0, 10)
        assert [event.seq for event in found] == [seq]
        assert "memory only" in store.problem
        assert store.status()["stored"] is False


async def test_a_second_process_does_not_share_the_file(tmp_path: Path) -> None:
    """If two stores use one file, the second keeps to memory, with other numbers, and takes over when the first has
    gone."""
    path = tmp_path / "events.db"
    async with opened(path) as (first, _):
        one = note(first, "d")
        async with opened(path) as (second, store):
            other = note(second, "d")
            assert "memory only" in store.problem
            assert one.id != other.id
    async with opened(path) as (history, _):
        assert [event.id for event in history.after(0, 9)[0]] == [one.id]


async def test_a_full_disk_drops_the_oldest_counts_them_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no file may grow, events are accepted without delay and without an error, those without room are counted,
    and the rest is stored once there is room."""
    monkeypatch.setattr(event_store, "MAX_WAITING", 3_000)
    path = tmp_path / "events.db"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with opened(path) as (history, store):
        note(history, "before")
        await until(lambda: store.waiting == 0)
        size = max(file.stat().st_size for file in tmp_path.iterdir())
        # Python ignores SIGXFSZ, so a write beyond this fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, limits[1]))
        try:
            for _ in range(5_000):
                last = note(history, "d").seq
            await until(lambda: bool(store.problem))
            for _ in range(2_000):
                last = note(history, "d").seq
            assert store.waiting <= 3_000
            assert store.dropped >= 4_000
            found, _ = await history.page(last - 1, 10)
            assert [event.seq for event in found] == [last]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        await until(lambda: not store.problem and store.waiting == 0)
    async with opened(path) as (history, _):
        assert history.after(last - 1, 10)[0][0].seq == last


async def test_a_disk_that_failed_for_a_while_leaves_no_gap(tmp_path: Path) -> None:
    """The file is opened again after a failure, and a clean end after that still makes the next number consecutive."""
    path = tmp_path / "events.db"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with opened(path) as (history, store):
        note(history, "before")
        await until(lambda: store.waiting == 0)
        size = max(file.stat().st_size for file in tmp_path.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4_096, limits[1]))
        try:
            for _ in range(500):
                last = note(history, "d").seq
            await until(lambda: bool(store.problem))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        await until(lambda: not store.problem and store.waiting == 0)
    async with opened(path) as (history, _):
        assert note(history, "after").seq == last + 1 == 502


SCHEMA_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE event (
  seq INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, device TEXT NOT NULL, slug TEXT NOT NULL,
  text TEXT NOT NULL, data TEXT NOT NULL, origin TEXT NOT NULL, incident TEXT NOT NULL);
CREATE INDEX event_device ON event (device, seq);
INSERT INTO meta VALUES ('origin', 'old'), ('seq', 7);
INSERT INTO event VALUES (7, {at}, 'verdict.offline', 'd', 's', 'x', '{"n": 1}', 'old', 'old:incident-1');
PRAGMA user_version = 1;
"""


async def test_a_file_of_the_schema_before_is_taken_over(tmp_path: Path) -> None:
    """A file of schema 1 keeps its events, its origin and its number, and accepts events of other replicas from then
    on. A file of an unknown schema is left alone, and that is reported."""
    path = tmp_path / "events.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMA_1.replace("{at}", str(NOW)))
    async with opened(path) as (history, store):
        (event,) = (await history.page(0, 10))[0]
        assert (event.id, event.own, event.data) == ("old:7", 0, {"n": 1})
        assert note(history, "d").id == "old:8"
        store.put(replace(event, seq=9_000, origin="other", own=3))
        await until(lambda: store.waiting == 0)
    async with opened(path) as (history, _):
        assert [e.id for e in (await history.page(7, 10))[0]] == ["old:8", "other:3"]
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 9")
    async with opened(path) as (_, store):
        assert "has schema 9, not 2" in store.problem
