"""The SQL of the event store: tables, rows, pages and deletion. Blocking; the thread of the store calls it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog import private_files
from nomad_watchdog.events.log import Event, EventFilter, Page
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import WallTime

TAIL: Final = 2_000
"""Maximum number of events of an earlier run that are read into memory at the start."""
MAX_DATA: Final = 4_096
MAX_LEFT_OPEN: Final = 100
MAX_ACTORS: Final = 20
"""Maximum size of a file of audit events, as a multiple of the part of one actor."""
_SCHEMA: Final = 2
_TABLES: Final = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE event (
  seq INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, device TEXT NOT NULL, slug TEXT NOT NULL,
  text TEXT NOT NULL, data TEXT NOT NULL, origin TEXT NOT NULL, incident TEXT NOT NULL,
  own INTEGER NOT NULL DEFAULT 0);
CREATE INDEX event_device ON event (device, seq);
PRAGMA user_version = {_SCHEMA};
"""
_TO_2: Final = """
ALTER TABLE event ADD COLUMN own INTEGER NOT NULL DEFAULT 0;
PRAGMA user_version = 2;
"""
"""From schema 1, which had no events of other replicas."""
_COLUMNS: Final = "seq, at, kind, device, slug, text, data, origin, incident, own"


@dataclass(frozen=True, slots=True)
class Found:
    """The state that an earlier run left: the last number that may be in use, and its last events."""

    origin: str
    """The one stored in the file, so that it stays the same from run to run; for a new file the proposed one."""
    seq: int = 0
    events: tuple[Event, ...] = ()
    left_open: tuple[tuple[str, str, float], ...] = ()
    """ID, text and time of incidents that were opened and not closed; the last MAX_LEFT_OPEN."""
    verdicts: tuple[tuple[Slug, str, float], ...] = ()
    """The last event of the verdict of each device: slug, kind and wall time."""
    origins: tuple[tuple[str, int], ...] = ()
    """The last own number of each control plane."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Events that belong to an incident."""

    seqs: tuple[int, ...]
    incident: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Events that are to be removed."""

    seqs: tuple[int, ...]


def connect(path: Path, origin: str) -> tuple[sqlite3.Connection, Found]:
    """Open or create the file. Raises sqlite3.Error, also for errors of the folder."""
    try:
        private_files.folder(path.parent)
        private_files.file(path)
    except OSError as error:
        raise sqlite3.OperationalError(str(error)) from error
    db = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
    try:
        # One process only: two that count from the same number would use numbers twice.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA journal_size_limit = 4194304")
        _make_tables(db, path, origin)
        (origin,) = db.execute("SELECT value FROM meta WHERE name = 'origin'").fetchone()
        last = db.execute("SELECT value FROM meta WHERE name = 'seq'").fetchone()
        rows = db.execute(
            f"SELECT {_COLUMNS} FROM event ORDER BY seq DESC LIMIT ?",  # noqa: S608  # our own names
            (TAIL,),
        ).fetchall()
        events = tuple(_event(row) for row in reversed(rows))
        number = int(last[0]) if last else 0
        left = _left_open(db)
        return db, Found(str(origin), number, events, left, _verdicts(db), _origins(db))
    except BaseException:
        db.close()
        raise


def _verdicts(db: sqlite3.Connection) -> tuple[tuple[Slug, str, float], ...]:
    # Beside max() SQLite gives the other columns of the same row (sqlite.org/lang_select.html, 2.5).
    rows = db.execute(
        "SELECT slug, kind, at, max(seq) FROM event WHERE kind GLOB 'verdict.*' GROUP BY slug"
    )
    return tuple((Slug(slug), kind, at) for slug, kind, at, _ in rows)


def _origins(db: sqlite3.Connection) -> tuple[tuple[str, int], ...]:
    number = "max(CASE own WHEN 0 THEN seq ELSE own END)"
    return tuple(db.execute(f"SELECT origin, {number} FROM event GROUP BY origin"))  # noqa: S608  # ours


def _left_open(db: sqlite3.Connection) -> tuple[tuple[str, str, float], ...]:
    opened: dict[str, tuple[str, float]] = {}
    for kind, incident, text, at in db.execute(
        "SELECT kind, incident, text, at FROM event"
        " WHERE kind IN ('incident.opened', 'incident.closed') ORDER BY seq"
    ):
        if kind == "incident.opened":
            opened[incident] = (text, at)
        else:
            opened.pop(incident, None)
    return tuple((incident, *told) for incident, told in opened.items())[-MAX_LEFT_OPEN:]


def _make_tables(db: sqlite3.Connection, path: Path, origin: str) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        db.executescript(f"BEGIN IMMEDIATE; {_TABLES}")
        db.execute("INSERT INTO meta VALUES ('origin', ?)", (origin,))
        db.execute("COMMIT")
    elif version == 1:
        db.executescript(f"BEGIN IMMEDIATE; {_TO_2} COMMIT;")
    elif version != _SCHEMA:
        raise sqlite3.OperationalError(f"{path.name} has schema {version}, not {_SCHEMA}")


def set_aside(path: Path) -> None:
    """Keep a damaged file under another name, in the place of one that was kept before."""
    for name in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        try:
            name.replace(name.with_name(f"{name.name}.damaged"))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise sqlite3.OperationalError(str(error)) from error


def select(db: sqlite3.Connection, bounds: tuple[int, int, int], wanted: EventFilter) -> Page:
    """A page: `bounds` are (since, before, limit) with since < seq < before."""
    since, before, limit = bounds
    clauses: list[str] = []
    values: list[object] = [since, before]
    for clause, value in (
        ("device = ?", wanted.device),
        ("substr(kind, 1, length(?)) = ?", wanted.kind),
        ("kind = ?", wanted.verdict and f"verdict.{wanted.verdict}"),
        ("at >= ?", wanted.not_before),
    ):
        if value:
            clauses.append(f" AND {clause}")
            values += [value] * clause.count("?")
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM event WHERE seq > ? AND seq < ?{''.join(clauses)}"  # noqa: S608
        " ORDER BY seq LIMIT ?",
        (*values, limit),
    ).fetchall()
    found = [_event(row) for row in rows]
    return found, found[-1].seq if len(found) == limit else before - 1


def rotate(db: sqlite3.Connection, most: int, oldest: float) -> None:
    """Delete all but the newest `most` events, and those from before `oldest` (wall time)."""
    db.execute(
        "DELETE FROM event WHERE seq <= (SELECT seq FROM event ORDER BY seq DESC LIMIT 1 OFFSET ?)",
        (most,),
    )
    # Events come in the order of their times, but for a clock that was set: stop at the first young one.
    db.execute(
        "DELETE FROM event WHERE seq < coalesce("
        "(SELECT seq FROM event WHERE at >= ? ORDER BY seq LIMIT 1), 9223372036854775807)",
        (oldest,),
    )


def rotate_actors(db: sqlite3.Connection, most: int) -> None:
    """Delete all but the newest `most` audit events of each actor of each control plane."""
    db.execute(
        "DELETE FROM event WHERE seq IN (SELECT seq FROM (SELECT seq, row_number() OVER ("
        "PARTITION BY origin, CASE WHEN json_valid(data) THEN json_extract(data, '$.actor') END "
        "ORDER BY seq DESC) AS place FROM event) "
        "WHERE place > ?)",
        (most,),
    )


def mark(db: sqlite3.Connection, mark: Mark) -> None:
    """Write that events belong to an incident."""
    rows: Iterable[tuple[Any, ...]] = ((mark.incident, seq) for seq in mark.seqs)
    db.executemany("UPDATE event SET incident = ? WHERE seq = ?", rows)


def drop(db: sqlite3.Connection, drop: Drop) -> None:
    """Remove events."""
    db.executemany("DELETE FROM event WHERE seq = ?", ((seq,) for seq in drop.seqs))


def insert(db: sqlite3.Connection, event: Event) -> None:
    """Write one event, if it is not there yet. It does not fail whatever the event contains: one that can't be written
    would block all others (S9)."""
    try:
        data = json.dumps(dict(event.data), default=str, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        data = _cut(event, _shown(event.data))
    if len(data) > MAX_DATA:
        data = _cut(event, data)
    text = (event.kind, event.device_id, event.slug, event.text, data, event.origin, event.incident)
    # SQLite stores no lone surrogates.
    safe = (t.encode("utf-8", "backslashreplace").decode() for t in text)
    row = (event.seq, event.at, *safe, event.own)
    db.execute("INSERT OR IGNORE INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def _cut(event: Event, data: str) -> str:
    """The beginning of data that is too long, or no JSON. The actor stays: each one has its own part of the file."""
    actor = {"actor": event.data["actor"]} if isinstance(event.data.get("actor"), str) else {}
    return json.dumps({**actor, "cut": data[: MAX_DATA // 2]})


def _shown(data: object) -> str:
    try:
        return ascii(data)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return ""


def _event(row: tuple[Any, ...]) -> Event:
    seq, at, kind, device, slug, text, data, origin, incident, own = row
    try:
        known = loads(data)
    except ValueError:
        known = {"cut": str(data)[:MAX_DATA]}
    return Event(seq, WallTime(at), kind, device, Slug(slug), text, known, origin, incident, own)
