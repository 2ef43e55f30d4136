"""Failures that only a file can have: crashes, other schemas, poison, a full disk."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nomad_watchdog.errors import TerminalError, TransientError, UserError
from nomad_watchdog.model import Epoch
from nomad_watchdog.registry import RegistrySnapshot
from nomad_watchdog.registry.codec import decode
from nomad_watchdog.registry.sqlite import SqliteRegistry
from tests.registry.records import record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "registry.sqlite"


@pytest_asyncio.fixture
async def sqlite(path: Path) -> AsyncIterator[SqliteRegistry]:
    registry = SqliteRegistry(path=path)
    await registry.initialise()
    yield registry
    await registry.close()


WRITER = """
import asyncio, sys
from nomad_watchdog.registry.sqlite import SqliteRegistry
from tests.registry.records import record

async def main():
    registry = SqliteRegistry(path=sys.argv[1])
    for i in range(100_000):
        (stored,) = await registry.commit([record(f"crash {i}")])
        print(stored.index, stored.device.id, flush=True)

asyncio.run(main())
"""


async def test_s4_acknowledged_writes_survive_kill_9(
    sqlite: SqliteRegistry, path: Path, repository: Path
) -> None:
    """Every record that a process had acknowledged before its SIGKILL exists afterwards."""
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=repository,
        ) as child:
            assert child.stdout is not None
            lines = [await asyncio.to_thread(child.stdout.readline) for _ in range(40)]
            child.kill()
            lines += child.stdout.read().splitlines(keepends=True)
        said = dict(line.strip().split(" ", 1)[::-1] for line in lines if line.endswith("\n"))
        assert len(said) >= 40
        kept = {one.device.id: one.index for one in (await sqlite.read()).records.values()}
        assert {name: int(index) for name, index in said.items()}.items() <= kept.items()
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("DELETE FROM device")


async def test_commits_are_synced_fully(sqlite: SqliteRegistry, path: Path) -> None:
    """The file is in WAL mode and the writing connection syncs fully, which S4 depends on."""
    from nomad_watchdog.registry._sqlite_file import _open

    with closing(_open(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


async def test_a_watch_goes_on_from_what_was_read(sqlite: SqliteRegistry, path: Path) -> None:
    """A change that another process writes between our last read and our watch of that index is returned first."""
    await sqlite.commit([record("before")])
    seen = await sqlite.read()
    other = SqliteRegistry(path=path)
    (stored,) = await other.commit([record("between")])
    await other.close()
    watch = sqlite.watch(seen.index)
    first = await asyncio.wait_for(anext(watch), 10.0)
    assert stored in first.records.values()
    rest = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.6)
    assert not rest.done()
    rest.cancel()
    await asyncio.gather(rest, return_exceptions=True)


POISON = {
    "no json": b"{",
    "deep": b"[" * 16_000,
    "large": b" " * 20_000,
    "not utf-8": b'{"v": "\xff"}',
    "a list": b"[]",
    "another version": b'{"v": 2}',
    "missing fields": b'{"v": 1}',
    "long number": b"9" * 6000,
}


async def test_s9_poison_hides_nobody(sqlite: SqliteRegistry, path: Path) -> None:
    """Invalid records are named with a reason, and all others are read."""
    (good,) = await sqlite.commit([record("good")])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany("INSERT INTO device VALUES (?, 1, ?)", list(POISON.items()))
    assert good is not None
    assert (await sqlite.read()).records == {good.slug: good}
    assert sqlite.poisoned.keys() == POISON.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slug", "other-" + "a" * 20),
        ("id", "tab\there"),
        ("id", 7),
        ("labels", {"a": 1}),
        ("labels", []),
        ("presence", "gone"),
        ("epoch", -1),
        ("epoch", True),
        ("epoch", 1.0),
        ("generation", 2**63),
        ("changed_at", "now"),
        ("changed_at", float("nan")),
        ("instance", None),
        ("address", "\ud800"),
        ("extra", 1),
        ("v", 2),
    ],
)
def test_s11_decode_is_strict(field: str, value: object) -> None:
    """One invalid field makes the whole record poison."""
    from nomad_watchdog.registry.codec import PoisonError, encode

    document = json.loads(encode(record("strict")))
    decode(json.dumps(document).encode())
    with pytest.raises(PoisonError):
        decode(json.dumps({**document, field: value}).encode())


async def test_record_too_large_is_refused(sqlite: SqliteRegistry) -> None:
    """A record over 16 KiB is a UserError before anything is written."""
    large = record("large")
    large = replace(large, device=replace(large.device, labels={"x": "y" * 17_000}))
    with pytest.raises(UserError, match="16384"):
        await sqlite.commit([record("small"), large])
    assert (await sqlite.read()).records == {}


async def test_full_disk_is_never_acknowledged(sqlite: SqliteRegistry, path: Path) -> None:
    """When the file can't grow, the commit raises TransientError, and everything stored stays."""
    (kept,) = await sqlite.commit([record("kept")])
    assert kept is not None
    real = sqlite3.connect

    def small(*args: object, **kwargs: object) -> sqlite3.Connection:
        connection: sqlite3.Connection = real(*args, **kwargs)  # type: ignore[call-overload]
        connection.execute("PRAGMA max_page_count = 5")
        return connection

    full = SqliteRegistry(path=path)
    sqlite3.connect = small  # type: ignore[assignment]
    try:
        with pytest.raises(TransientError, match="full"):
            await full.commit([record(f"bulk {i}") for i in range(500)])
    finally:
        sqlite3.connect = real
        await full.close()
    assert (await sqlite.read()).records == {kept.slug: kept}


async def test_other_schema_and_other_files_are_refused(path: Path, tmp_path: Path) -> None:
    """A newer schema is a UserError, and a file that is not a database a TerminalError."""
    newer = tmp_path / "newer.sqlite"
    with closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 99")
    junk = tmp_path / "junk.sqlite"
    junk.write_bytes(b"no database at all" * 1000)
    for file, expected in ((newer, UserError), (junk, TerminalError)):
        registry = SqliteRegistry(path=file)
        with pytest.raises(expected):
            await registry.initialise()
        with pytest.raises(expected):
            await registry.read()
        with pytest.raises(expected):
            await registry.commit([record("x")])
        await registry.close()


async def test_file_is_private(sqlite: SqliteRegistry, path: Path) -> None:
    """Only its owner can read the file."""
    assert path.stat().st_mode & 0o077 == 0


async def test_close_finishes_what_was_handed_in(path: Path) -> None:
    """Commits in progress when `close` is called are answered, later ones are refused."""
    registry = SqliteRegistry(path=path)
    await registry.initialise()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(registry.commit([record(f"c {i}")])) for i in range(20)]
        await asyncio.sleep(0)
        await registry.close()
    assert all(task.result() != [None] for task in tasks)
    with pytest.raises(TerminalError, match="closed"):
        await registry.commit([replace(record("late"), epoch=Epoch(1))])


async def test_own_commits_are_read_seldom_and_those_of_others_soon(
    sqlite: SqliteRegistry, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a storm of our own commits, a watch waits until they are over before it reads the file again; a commit of
    another process does not wait."""
    monkeypatch.setattr("nomad_watchdog.registry.sqlite._GAP_PER_OWN", 1e9)
    monkeypatch.setattr("nomad_watchdog.registry.sqlite._GAP_OWN_S", 1e9)
    looks = 0
    state = sqlite._state

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return state()

    monkeypatch.setattr(sqlite, "_state", counted)
    other = SqliteRegistry(path=path)
    shown: asyncio.Queue[RegistrySnapshot] = asyncio.Queue()

    async def follow() -> None:
        async for snapshot in sqlite.watch(0):
            shown.put_nowait(snapshot)

    task = asyncio.ensure_future(follow())
    try:
        await shown.get()
        for number in range(5):
            await sqlite.commit([record(f"own {number}")])
            before = looks
            while looks < before + 2:  # the second one started after the commit
                await asyncio.sleep(0.01)
        assert shown.empty()
        await other.commit([record("theirs")])
        async with asyncio.timeout(60.0):
            assert record("theirs").slug in (await shown.get()).records
        await sqlite.commit([record("last")])
        monkeypatch.setattr("nomad_watchdog.registry.sqlite._GAP_OWN_S", 0.1)
        async with asyncio.timeout(60.0):
            while record("last").slug not in (await shown.get()).records:
                pass
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await other.close()


@pytest.mark.parametrize("backup", ["another file", "no file"])
async def test_s4_nothing_is_acknowledged_into_a_file_that_was_replaced(
    sqlite: SqliteRegistry, path: Path, tmp_path: Path, backup: str
) -> None:
    """Once the file was replaced or removed, reads, writes and the watch raise UserError with what to do; when the
    first file is back they work again."""
    (stored,) = await sqlite.commit([record("kept")])
    assert stored is not None
    watch = sqlite.watch(0)
    assert len((await anext(watch)).records) == 1
    aside = tmp_path / "aside.sqlite"
    path.rename(aside)
    if backup == "another file":
        shutil.copy(aside, path)
    for call in (
        sqlite.read,
        lambda: sqlite.commit([record("lost")]),
        lambda: sqlite.document("pauses"),
        lambda: anext(watch),
    ):
        with pytest.raises(UserError, match=r"was replaced or removed .* stop the service"):
            await call()
    aside.rename(path)
    assert await sqlite.get(stored.slug) == stored
    assert await sqlite.commit([record("new")]) != [None]
