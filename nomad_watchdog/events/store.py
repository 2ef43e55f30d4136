"""Events on disk: one bounded SQLite file that survives `kill -9`.

One thread with one connection writes all events that have gathered in one transaction. A full disk, a damaged file or a
file that another process has open stops nothing: events stay in memory, the status reports it, and dropped events are
counted.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nomad_watchdog.core import request_meter
from nomad_watchdog.errors import TransientError
from nomad_watchdog.events import _sql as sql
from nomad_watchdog.events._sql import Drop, Found, Mark
from nomad_watchdog.events.log import Event, EventFilter, Page

log = logging.getLogger(__name__)

MAX_WAITING: Final = 20_000
"""Maximum number of events that wait for the disk; of more, the oldest are dropped."""
GROUP: Final = 2_000
"""Maximum number of events in one transaction."""
GATHER_S: Final = 0.02
"""Time to wait for more events before they are written. A crash may lose as much; a burst shares a transaction."""
RETRY_S: Final = (0.5, 30.0)
"""First and maximum wait after the disk failed, seconds."""
RESERVE: Final = 100_000
"""Number of event numbers after the last stored one that a crash may have used without storing them; the next run
begins after them. A clean end leaves no gap."""
ROTATE_EVERY: Final = 1_000
ROTATE_EVERY_S: Final = 600.0
"""Old events are deleted after this number of new ones, or after this many idle seconds."""
_OPEN_S: Final = 5.0
_SELECT_S: Final = 10.0
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


@dataclass(frozen=True, slots=True)
class _Query:
    run: Callable[[sqlite3.Connection], Page]
    done: Future[Page]


class EventStore:
    """The events of one control plane in a file: at most `max_events`, none older than `max_age_s`. `per_actor`:
    `max_events` is per actor. A new file gets `origin`, which must be unique among all control planes."""

    def __init__(
        self,
        path: Path,
        *,
        origin: str = "local",
        max_events: int = 100_000,
        max_age_s: float = 2_592_000.0,
        per_actor: bool = False,
    ) -> None:
        self.path = path
        self.origin = origin
        self.max_events = max_events
        self.max_age_s = max_age_s
        self.per_actor = per_actor
        self.problem = "not open yet"
        """Why events are in memory only; "" = they are stored."""
        self.dropped = 0
        """Number of events that were dropped while the disk failed."""
        self.left_open: dict[str, tuple[str, float]] = {}
        """ID → text and time of incidents that the last run left open; set by `open`."""
        self._found: Future[Found] = Future()
        self._lock = threading.Condition()
        self._events: deque[Event | Mark | Drop] = deque()
        self._queries: deque[_Query] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._seq = 0
        self._since_rotation = ROTATE_EVERY
        self._retry_s = RETRY_S[0]
        self._damaged = False

    # -- from the event loop --------------------------------------------------------------------

    async def open(self) -> Found:
        """Open or create the file. Never raises: `problem` states why it can't be opened, and then numbers continue
        from the clock, above all that may be in the file."""
        self._thread.start()
        try:
            async with asyncio.timeout(_OPEN_S):
                found = await asyncio.shield(asyncio.wrap_future(self._found))
        except TimeoutError:
            return Found(self.origin, _from_clock())
        self.left_open = {incident: (text, at) for incident, text, at in found.left_open}
        return found

    def put(self, event: Event) -> None:
        """Store one event soon; never blocks, never raises."""
        self._enqueue(event)

    def mark(self, seqs: Sequence[int], incident: str) -> None:
        """Record later that these events belong to an incident."""
        self._enqueue(Mark(tuple(seqs), incident))

    def drop(self, seqs: Sequence[int]) -> None:
        """Remove these events."""
        self._enqueue(Drop(tuple(seqs)))

    def _enqueue(self, item: Event | Mark | Drop) -> None:
        with self._lock:
            if len(self._events) >= MAX_WAITING:
                self.dropped += isinstance(self._events.popleft(), Event)
            self._events.append(item)
            self._lock.notify()

    @property
    def waiting(self) -> int:
        """Number of events that are not on disk yet."""
        return len(self._events)

    def status(self) -> dict[str, object]:
        """For the status and the metrics."""
        return {
            "stored": not self.problem,
            "reason": self.problem,
            "dropped": self.dropped,
            "waiting": self.waiting,
        }

    async def select(self, since: int, before: int, limit: int, wanted: EventFilter) -> Page:
        """Events with since < seq < before, oldest first; none while events are kept in memory only. Raises
        TransientError when they can't be read now."""
        cpu_s = [0.0]
        query = _Query(
            _timed(lambda db: sql.select(db, (since, before, limit), wanted), cpu_s), Future()
        )
        with self._lock:
            if self.problem or self._closing:
                return [], before - 1
            self._queries.append(query)
            self._lock.notify()
        try:
            async with asyncio.timeout(_SELECT_S):
                return await asyncio.wrap_future(query.done)
        except (TimeoutError, sqlite3.Error) as error:
            raise TransientError(
                f"stored events can't be read: {str(error) or 'time-out'}"
            ) from error
        finally:
            request_meter.charge(cpu_s[0])

    async def close(self) -> None:
        """Write what was passed in, if the disk works, and close the file. Idempotent."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, _OPEN_S)

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        db: sqlite3.Connection | None = None
        while True:
            try:
                if db is None:
                    db = self._open()
                if not self._step(db):
                    break
            except sqlite3.Error as error:
                self._on_failure(error)
            except (
                Exception
            ) as error:  # the thread's boundary: a bug costs the disk, not the events
                log.exception("the event store crashed")
                self._on_failure(sqlite3.InternalError(f"internal error: {type(error).__name__}"))
            else:
                continue
            _close(db)
            db = None
            with self._lock:
                if self._closing:
                    break
                self._lock.wait_for(lambda: self._closing, self._retry_s)
            self._retry_s = min(max(2 * self._retry_s, RETRY_S[0]), RETRY_S[1])
        self._refuse("the event store was closed")
        _close(db)

    def _step(self, db: sqlite3.Connection) -> bool:
        """Run the queries and write the events that wait; false after the last ones."""
        with self._lock:
            self._lock.wait_for(
                lambda: self._events or self._queries or self._closing, ROTATE_EVERY_S
            )
            if not self._queries and not self._closing:
                self._lock.wait_for(lambda: self._queries or self._closing, GATHER_S)
            batch = [self._events[n] for n in range(min(GROUP, len(self._events)))]
            closing = self._closing
        answered = self._answer(db)
        last = closing and len(batch) < GROUP
        if batch or last or not answered:
            self._write(db, batch, clean=last)
            with self._lock:
                # Some may have been dropped from the left meanwhile, although they were written.
                gone = {id(item) for item in batch}
                while self._events and id(self._events[0]) in gone:
                    self._events.popleft()
        self._on_success()
        return not last

    def _answer(self, db: sqlite3.Connection) -> int:
        """Run the waiting queries; how many. Those after one that fails stay in the queue."""
        count = 0
        while True:
            with self._lock:
                if not self._queries:
                    return count
                query = self._queries.popleft()
            _answer(db, query)
            count += 1

    def _write(
        self, db: sqlite3.Connection, batch: Sequence[Event | Mark | Drop], *, clean: bool
    ) -> None:
        with db:
            db.execute("BEGIN IMMEDIATE")
            for item in batch:
                if isinstance(item, Event):
                    sql.insert(db, item)
                    self._seq = max(self._seq, item.seq)
                elif isinstance(item, Mark):
                    sql.mark(db, item)
                else:
                    sql.drop(db, item)
            reserve = 0 if clean else RESERVE
            db.execute("INSERT OR REPLACE INTO meta VALUES ('seq', ?)", (self._seq + reserve,))
            self._since_rotation += len(batch) or ROTATE_EVERY
            if self._since_rotation >= ROTATE_EVERY:
                most = self.max_events
                if self.per_actor:
                    sql.rotate_actors(db, most)
                    most *= sql.MAX_ACTORS
                sql.rotate(db, most, time.time() - self.max_age_s)  # noqa: TID251  # ages on disk
                self._since_rotation = 0

    def _open(self) -> sqlite3.Connection:
        if self._damaged:
            log.error("the event store is damaged; a new one is created")
            sql.set_aside(self.path)
        db, found = sql.connect(self.path, self.origin)
        if self._damaged:
            # The numbers of the lost file are not known: begin above them.
            found, self._damaged = Found(self.origin, _from_clock()), False
        if not self._found.done():
            self._seq, self.origin = found.seq, found.origin
        # The numbers that this run may use are reserved before it uses one.
        self._write(db, (), clean=False)
        self._on_success()
        if not self._found.done():
            self._found.set_result(found)
        return db

    def _on_success(self) -> None:
        if self.problem and self.problem != "not open yet":
            log.warning("events are stored again", extra={"dropped": self.dropped})
        self.problem = ""
        self._retry_s = RETRY_S[0]

    def _on_failure(self, error: sqlite3.Error) -> None:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED and not self._damaged:
            self._damaged, self._retry_s = True, 0.0
            return
        name = getattr(error, "sqlite_errorname", "SQLITE_ERROR")
        problem = f"events are kept in memory only: {error} ({name})"
        if problem != self.problem:
            log.error("events can't be stored", extra={"reason": problem})
        self.problem = problem
        if not self._found.done():
            self._seq = _from_clock()
            self._found.set_result(Found(self.origin, self._seq))
        self._refuse(problem)

    def _refuse(self, why: str) -> None:
        with self._lock:
            queries = [self._queries.popleft() for _ in range(len(self._queries))]
        for query in queries:
            if query.done.set_running_or_notify_cancel():
                query.done.set_exception(sqlite3.OperationalError(why))


def _close(db: sqlite3.Connection | None) -> None:
    if db is not None:
        with suppress(sqlite3.Error):
            db.close()


def _answer(db: sqlite3.Connection, query: _Query) -> None:
    if not query.done.set_running_or_notify_cancel():
        return  # the caller was cancelled
    try:
        query.done.set_result(query.run(db))
    except sqlite3.Error as error:
        query.done.set_exception(error)
        raise


def _timed(
    run: Callable[[sqlite3.Connection], Page], cpu_s: list[float]
) -> Callable[[sqlite3.Connection], Page]:
    """The same query; it stores the CPU seconds that it used in `cpu_s`."""

    def timed(db: sqlite3.Connection) -> Page:
        began = time.thread_time()
        try:
            return run(db)
        finally:
            cpu_s[0] = time.thread_time() - began

    return timed


def _from_clock() -> int:
    """A number above any that was counted: microseconds since 1970."""
    return int(time.time() * 1_000_000)  # noqa: TID251  # no decision depends on it
