"""The documents in an SQLite registry: a table of their own, inside the caller's transaction.

The table is made by the first document that is written, so that a file without any is as it always was,
and a program that knows no documents reads it still.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from nomad_watchdog.registry import RegistryDocument

_TABLE: Final = (
    "CREATE TABLE IF NOT EXISTS document "
    "(name TEXT PRIMARY KEY, idx INTEGER NOT NULL, body BLOB NOT NULL) WITHOUT ROWID"
)


def read(connection: sqlite3.Connection, name: str) -> RegistryDocument:
    """The document, or an empty one."""
    table = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'document'").fetchone()
    if table is None:
        return RegistryDocument()
    found = connection.execute("SELECT body, idx FROM document WHERE name = ?", (name,))
    row = found.fetchone()
    return RegistryDocument() if row is None else RegistryDocument(*row)


def write(
    connection: sqlite3.Connection, name: str, document: RegistryDocument, index: int
) -> bool:
    """Store the body at `index` if the stored index is `document.index`; whether it was."""
    connection.execute(_TABLE)
    if document.index == 0:
        statement = "INSERT INTO document VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING"
        values: tuple[object, ...] = (name, index, document.body)
    else:
        statement = "UPDATE document SET idx = ?2, body = ?3 WHERE name = ?1 AND idx = ?4"
        values = (name, index, document.body, document.index)
    return connection.execute(statement, values).rowcount == 1
