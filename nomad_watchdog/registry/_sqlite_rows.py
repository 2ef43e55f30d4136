"""Compare-and-set of many rows in few statements; blocking, within a transaction of the caller's.

Each step of a statement gives the interpreter lock away and has to wait for it, for milliseconds when the
event loop is busy: what is one statement for many rows costs a busy program one such wait, not one a row.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final

Row = tuple[str, int, bytes]
"""Slug, expected index (0 = it must not exist), body."""
_SIZES: Final = (256, 64, 16, 4)
"""Rows of one statement: few sizes, so that each is compiled once."""


def write(db: sqlite3.Connection, rows: Sequence[Row], index: int) -> list[int | None]:
    """Write those that have the index which is expected. The new index of each, counted up from `index` by
    one for each row that was written, in order; None where the compare-and-set lost."""
    done: list[int | None] = []
    for part in _parts(rows):
        if len(part) > 1 and _all(db, part, index):
            done += range(index + 1, index + 1 + len(part))
            index += len(part)
            continue
        for row in part:
            won = _one(db, row, index + 1)
            index += won
            done.append(index if won else None)
    return done


def _parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Runs of rows that one statement can write: all new or all known, each slug once."""
    first = 0
    while first < len(rows):
        size = next((size for size in _SIZES if _alike(rows, first, size)), 1)
        yield rows[first : first + size]
        first += size


def _alike(rows: Sequence[Row], first: int, size: int) -> bool:
    if first + size > len(rows):
        return False
    part = rows[first : first + size]
    new = part[0][1] == 0
    return all((row[1] == 0) is new for row in part) and len({row[0] for row in part}) == size


def _all(db: sqlite3.Connection, part: Sequence[Row], index: int) -> bool:
    """Write all of them; False, and nothing is written, when one of them lost."""
    new = part[0][1] == 0
    values: list[object] = []
    for number, (slug, expected, body) in enumerate(part, index + 1):
        values += (slug, number, body) if new else (slug, number, body, expected)
    holes = ",".join(["(?,?,?)" if new else "(?,?,?,?)"] * len(part))
    statement = (
        f"INSERT INTO device VALUES {holes} ON CONFLICT DO NOTHING"  # noqa: S608  # marks only
        if new
        else "UPDATE device SET idx = new.column2, body = new.column3 "  # noqa: S608  # marks only
        f"FROM (VALUES {holes}) AS new WHERE device.slug = new.column1 AND device.idx = new.column4"
    )
    db.execute("SAVEPOINT rows")
    if db.execute(statement, values).rowcount == len(part):
        db.execute("RELEASE rows")
        return True
    db.execute("ROLLBACK TO rows")
    db.execute("RELEASE rows")
    return False


def _one(db: sqlite3.Connection, row: Row, index: int) -> bool:
    slug, expected, body = row
    if expected == 0:
        statement = "INSERT INTO device VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING"
        values: tuple[object, ...] = (slug, index, body)
    else:
        statement = "UPDATE device SET idx = ?2, body = ?3 WHERE slug = ?1 AND idx = ?4"
        values = (slug, index, body, expected)
    return db.execute(statement, values).rowcount == 1
