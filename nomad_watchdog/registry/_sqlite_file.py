"""The file of an SQLite registry: connections, transactions, errors, and the data about the registry itself."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nomad_watchdog import private_files
from nomad_watchdog.errors import NoRegistryError, TerminalError, TransientError, UserError

_SCHEMA: Final = 1
_BUSY_S: Final = 5.0
"""How long a write waits for another process's."""


_TEMPORARY: Final = frozenset(
    {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
    | {sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_PROTOCOL}
)


class _Connection(sqlite3.Connection):
    """Knows which file it has open."""

    file: tuple[int, int] = (0, 0)
    """Device and inode."""


def _open(path: Path) -> _Connection:
    """A connection in autocommit; never makes the file."""
    if not path.exists():
        raise NoRegistryError(
            f"there is no registry at {path}: check the path; bring lost records back with "
            "`nomad-watchdog registry import FILE`; only for a new installation run "
            "`nomad-watchdog init`"
        )
    private_files.close_to_others(path)
    uri = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(
        uri,
        uri=True,
        timeout=_BUSY_S,
        isolation_level=None,
        check_same_thread=False,
        factory=_Connection,
    )
    try:
        connection.file = _file_at(path)
        _to_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _to_wal(connection: sqlite3.Connection) -> None:
    """Where two change a new file's mode at once, SQLite says busy to one without waiting."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            threading.Event().wait(0.02)
        else:
            return


def _version(connection: sqlite3.Connection, path: Path) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in {0, _SCHEMA}:
        raise UserError(
            f"the registry {path} has schema {version}; this program knows {_SCHEMA}: it was made by "
            "another version of nomad-watchdog, use that one"
        )
    return int(version)


def _file_at(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def _installation(connection: _Connection, path: Path) -> str:
    if connection.file != _file_at(path):
        # SQLite goes on with the old file, and what is acknowledged would be lost at the next start (S4).
        raise UserError(
            f"the registry {path} was replaced or removed while this service had it open, so nothing is "
            "written any more: stop the service, put the right file there, delete the files with its name "
            "and -wal or -shm at the end unless they were restored with it, and start the service"
        )
    row = None
    if _version(connection, path) == _SCHEMA:
        found = connection.execute("SELECT value FROM meta WHERE name = 'installation'")
        row = found.fetchone()
    if row is None:
        raise NoRegistryError(
            f"the registry {path} was never initialised, or was wiped; bring lost records back with "
            "`nomad-watchdog registry import FILE`; only for a new installation run "
            "`nomad-watchdog init`"
        )
    return str(row[0])


def _counter(connection: _Connection) -> int:
    (index,) = connection.execute("SELECT value FROM meta WHERE name = 'idx'").fetchone()
    return int(index)


def _set_counter(connection: _Connection, index: int) -> None:
    connection.execute("UPDATE meta SET value = ? WHERE name = 'idx'", (str(index),))


@contextmanager
def _transaction(connection: _Connection, path: Path) -> Iterator[None]:
    """One transaction that writes, on the registry that was opened. Raises UserError if it is another one by now."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        _installation(connection, path)
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _translate(error: Exception, path: Path) -> Exception:
    """An error of SQLite as one of ours; any other error as it is."""
    if not isinstance(error, sqlite3.Error):
        return error
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the extension
    message = f"the registry {path}: {error}"
    return TransientError(message) if code in _TEMPORARY else TerminalError(message)
