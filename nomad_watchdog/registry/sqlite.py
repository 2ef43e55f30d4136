"""The registry in one SQLite file: for one machine, without a server.

WAL and full sync: a commit is on disk when it returns (S4). All commits of records go through one thread
(`_sqlite_writer.py`), so that a burst of them shares its fsyncs.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from nomad_watchdog import private_files
from nomad_watchdog.clock import steps
from nomad_watchdog.errors import TerminalError, UserError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord
from nomad_watchdog.registry import (
    CommitGuard,
    RegistryDocument,
    RegistrySnapshot,
    check_document,
)
from nomad_watchdog.registry import _sqlite_documents as documents
from nomad_watchdog.registry._sqlite_file import (
    _SCHEMA,
    _Connection,
    _counter,
    _installation,
    _open,
    _set_counter,
    _transaction,
    _translate,
    _version,
)
from nomad_watchdog.registry._sqlite_writer import GroupWriter
from nomad_watchdog.registry.codec import Decoder, PoisonError, decode, encode

_T = TypeVar("_T")
_POLL_S: Final = 0.25
"""Interval at which a watch checks whether another process wrote: one pragma, without reading pages of the file."""
_GAP_PER_COST: Final = 20.0
"""A watch reads all rows each time: at most a twentieth of the time goes into it."""
_GAP_PER_OWN: Final = 100.0
_GAP_OWN_S: Final = 2.0
"""And a hundredth while the last write was ours; then what another process wrote just before it is seen so
much later at most. Below the period after which a watch that shows no news is doubted (`controllers/agents/record_informer.py`)."""
_NEVER: Final = -1, -1
_TABLES: Final = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE device (slug TEXT PRIMARY KEY, idx INTEGER NOT NULL, body BLOB NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {_SCHEMA};
"""


class SqliteRegistry:
    """A store of device records in a file."""

    def __init__(self, *, path: str | Path) -> None:
        self._path = Path(path)
        self._decoder = Decoder()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="registry-read")
        self._connection: _Connection | None = None
        """Of the reader thread."""
        self._written = 0
        """Index of our own last commit."""
        self._opened = 0
        self._store, self._seen = "", 0
        """Installation and index of the last read."""
        self._read_last = -1, _NEVER
        """Index and state of the file of the last read."""
        self._writer = GroupWriter(self._path)
        self._wakes: set[asyncio.Event] = set()
        self._closed = False

    @property
    def poisoned(self) -> Mapping[str, str]:
        return self._decoder.poisoned

    async def initialise(self, installation: str = "") -> str:
        return await self._in_reader(lambda: self._initialise(installation))

    async def installation(self) -> str:
        return await self._in_reader(lambda: _installation(self._connected(), self._path))

    async def read(self) -> RegistrySnapshot:
        return await self._in_reader(self._read)

    async def get(self, slug: Slug) -> DeviceRecord | None:
        row = await self._in_reader(lambda: self._get(slug))
        if row is None:
            return None
        try:
            return decode(row[1], slug=slug, index=row[0])
        except PoisonError as error:
            raise TerminalError(f"the record {slug} can't be used: {error}") from error

    async def commit(
        self,
        records: Sequence[DeviceRecord],
        guards: Sequence[CommitGuard] = (),  # noqa: ARG002  # no lock lives in this store
    ) -> Sequence[DeviceRecord | None]:
        rows = [
            (str(record.slug), record.index, encode(record))
            async for some in steps(records)
            for record in some
        ]
        self._check_open()
        indexes = await self._writer.write(rows)
        self._written = max((one for one in indexes if one is not None), default=self._written)
        for wake in self._wakes:
            wake.set()
        return [
            None if index is None else replace(record, index=index)
            async for some in steps(list(zip(records, indexes, strict=True)))
            for record, index in some
        ]

    async def forget(self, records: Sequence[DeviceRecord]) -> Sequence[bool]:
        rows = [(str(record.slug), record.index) for record in records]
        return await self._in_reader(lambda: self._forget(rows)) if rows else ()

    async def watch(self, index: int) -> AsyncIterator[RegistrySnapshot]:
        # What was read for this index need not be read again to find that it has not changed.
        version = self._read_last[1] if self._read_last[0] == index else _NEVER
        read_at, cost_s = 0.0, 0.0
        wake = asyncio.Event()
        self._wakes.add(wake)
        try:
            while True:
                wake.clear()
                gap_s = _POLL_S
                now, counter = await self._in_reader(self._state)
                # our own writes are known: the file is not read again and again during a burst of them
                ours = counter == self._written
                rested = time.monotonic() - read_at >= min(_GAP_PER_OWN * cost_s, _GAP_OWN_S)
                if now != version and (rested or not ours):
                    started = time.monotonic()
                    snapshot = await self.read()
                    read_at, cost_s = time.monotonic(), time.monotonic() - started
                    gap_s = max(_POLL_S, _GAP_PER_COST * cost_s)
                    # Rows that are deleted manually do not change the counter: every change of the file counts.
                    news, version = version != _NEVER or snapshot.index != index, now
                    if news:
                        yield snapshot
                await asyncio.sleep(gap_s - _POLL_S)
                await _woken(wake, _POLL_S)
        finally:
            self._wakes.discard(wake)

    async def document(self, name: str) -> RegistryDocument:
        check_document(name)
        return await self._in_reader(lambda: self._document(name))

    async def commit_document(
        self, name: str, document: RegistryDocument
    ) -> RegistryDocument | None:
        check_document(name, document.body)
        index = await self._in_reader(lambda: self._commit_document(name, document))
        return None if index is None else replace(document, index=index)

    async def check_writable(self) -> None:
        await self._in_reader(self._check_writable)

    async def close(self) -> None:
        """Write what was passed in, then close the file. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._writer.close()
        await asyncio.get_running_loop().run_in_executor(self._reader, self._disconnect)
        self._reader.shutdown()

    def _check_open(self) -> None:
        if self._closed:
            raise TerminalError(f"the registry {self._path} was closed")

    async def _in_reader(self, work: Callable[[], _T]) -> _T:
        self._check_open()

        def translated() -> _T:
            try:
                return work()
            except sqlite3.Error as error:
                raise _translate(error, self._path) from error

        return await asyncio.get_running_loop().run_in_executor(self._reader, translated)

    def _initialise(self, installation: str) -> str:
        if not self._path.exists():
            try:
                private_files.folder(self._path.parent)
                private_files.file(self._path)
            except OSError as error:
                raise UserError(f"the registry {self._path} can't be created: {error}") from error
        with closing(_open(self._path)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            if _version(connection, self._path) == 0:
                for statement in _TABLES.strip().split("\n"):
                    connection.execute(statement)
                own = installation or str(uuid.uuid4())
                identity = [("installation", own), ("idx", "1")]
                connection.executemany("INSERT INTO meta VALUES (?, ?)", identity)
            connection.execute("COMMIT")
            return _installation(connection, self._path)

    def _connected(self) -> _Connection:
        if self._connection is None:
            self._connection = _open(self._path)
            self._opened += 1
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _state(self) -> tuple[tuple[int, int], int]:
        """A value that changes with every change of the file, and the index."""
        connection = self._connected()
        version = self._version_of(connection)
        _installation(connection, self._path)
        return version, _counter(connection)

    def _version_of(self, connection: sqlite3.Connection) -> tuple[int, int]:
        """Differs when another connection has changed the file. Each connection counts for itself."""
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        return self._opened, int(version)

    def _read(self) -> RegistrySnapshot:
        connection = self._connected()
        connection.execute("BEGIN")  # one state for the index and the rows
        try:
            store = _installation(connection, self._path)
            index = _counter(connection)
            self._read_last = index, self._version_of(connection)
            if (
                store != self._store or index < self._seen
            ):  # a restored copy: equal indexes mean nothing
                self._decoder.forget()
            self._store, self._seen = store, index
            rows = connection.execute("SELECT slug, slug, idx, body FROM device").fetchall()
        finally:
            connection.execute("ROLLBACK")
        records = self._decoder.decode(rows)
        return RegistrySnapshot(records, index, self._decoder.unreadable)

    def _get(self, slug: Slug) -> tuple[int, bytes] | None:
        connection = self._connected()
        _installation(connection, self._path)
        found = connection.execute("SELECT idx, body FROM device WHERE slug = ?", (slug,))
        row: tuple[int, bytes] | None = found.fetchone()
        return row

    def _document(self, name: str) -> RegistryDocument:
        connection = self._connected()
        _installation(connection, self._path)
        return documents.read(connection, name)

    def _commit_document(self, name: str, document: RegistryDocument) -> int | None:
        connection = self._connected()
        with _transaction(connection, self._path):
            index = _counter(connection) + 1
            if not documents.write(connection, name, document, index):
                return None
            _set_counter(connection, index)
        return index

    def _check_writable(self) -> None:
        with _transaction(self._connected(), self._path):
            pass

    def _forget(self, rows: Sequence[tuple[str, int]]) -> list[bool]:
        connection = self._connected()
        with _transaction(connection, self._path):
            index = _counter(connection)
            for row in rows:
                delete = "DELETE FROM device WHERE slug = ? AND idx = ?"
                index += connection.execute(delete, row).rowcount
            left = "SELECT 1 FROM device WHERE slug = ?"
            gone = [connection.execute(left, row[:1]).fetchone() is None for row in rows]
            _set_counter(connection, index)
        return gone


async def _woken(wake: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await wake.wait()
    except TimeoutError:
        pass
