"""Writes the rows of many commits in one transaction, in a thread of its own."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from nomad_watchdog.registry import _sqlite_rows
from nomad_watchdog.registry._sqlite_file import (
    _Connection,
    _counter,
    _open,
    _set_counter,
    _transaction,
    _translate,
)
from nomad_watchdog.registry._sqlite_rows import Row

_GROUP: Final = 1000
"""Maximum number of commits in one transaction."""
_Indexes = list[int | None]


@dataclass(frozen=True, slots=True)
class _Write:
    rows: list[Row]
    done: asyncio.Future[_Indexes]
    """Of the loop that waits."""


class GroupWriter:
    """The writer of one file. Commits that arrive while it writes share the next transaction, and its fsync."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fresh: list[_Write] = []
        """Of this turn of the loop."""
        self._writes: queue.SimpleQueue[list[_Write] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def write(self, rows: list[Row]) -> _Indexes:
        """New index of each row in order; None where the compare-and-set lost. Durable when it returns."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="registry-write", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        write = _Write(rows, loop.create_future())
        # All commits of one turn of the loop together: each wake-up of the thread costs the loop the interpreter.
        if not self._fresh:
            loop.call_soon(self._hand_over)
        self._fresh.append(write)
        return await write.done

    async def close(self) -> None:
        """Write what was passed in, then end the thread."""
        self._hand_over()
        self._writes.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _hand_over(self) -> None:
        if self._fresh:
            self._writes.put(self._fresh)
            self._fresh = []

    def _run(self) -> None:
        """The thread: until it receives the None that `close` puts last."""
        connection: _Connection | None = None
        try:
            while (first := self._writes.get()) is not None:
                group, is_last = self._gather(first)
                try:
                    if connection is None:
                        connection = _open(self._path)
                    results = _apply(connection, self._path, group)
                except Exception as error:  # noqa: BLE001  # the thread's boundary: the waiting task gets it
                    raised = _translate(error, self._path)
                    raised.__cause__ = error if raised is not error else None
                    _deliver(group, raised)
                else:
                    _deliver(group, results)
                if is_last:
                    return
        finally:
            if connection is not None:
                connection.close()

    def _gather(self, first: list[_Write]) -> tuple[list[_Write], bool]:
        """What waits now, without what was cancelled meanwhile; whether the end was among it."""
        group, is_last = list(first), False
        while len(group) < _GROUP and not is_last:
            try:
                more = self._writes.get_nowait()
            except queue.Empty:
                break
            if more is None:
                is_last = True
            else:
                group += more
        return [write for write in group if not write.done.cancelled()], is_last


def _deliver(group: Sequence[_Write], results: Sequence[_Indexes] | Exception) -> None:
    """Wake the waiting tasks: each loop once, because a wake-up from another thread costs a system call."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[_Write, _Indexes | Exception]]] = {}
    for number, write in enumerate(group):
        result = results if isinstance(results, Exception) else results[number]
        loops.setdefault(write.done.get_loop(), []).append((write, result))
    for loop, some in loops.items():
        with suppress(RuntimeError):  # it was closed: no task waits any more
            loop.call_soon_threadsafe(_settle, some)


def _settle(results: Sequence[tuple[_Write, _Indexes | Exception]]) -> None:
    for write, result in results:
        if write.done.done():
            continue
        if isinstance(result, Exception):
            write.done.set_exception(result)
        else:
            write.done.set_result(result)


def _apply(connection: _Connection, path: Path, group: Sequence[_Write]) -> list[_Indexes]:
    """All writes of the group in one transaction; new indexes, None where a compare-and-set lost."""
    with _transaction(connection, path):
        index = _counter(connection)
        written = _sqlite_rows.write(connection, [row for one in group for row in one.rows], index)
        _set_counter(connection, index + sum(one is not None for one in written))
    rest = iter(written)
    return [list(islice(rest, len(one.rows))) for one in group]
