"""Pools as processes of this machine: ``<directory>/<pool>/<slot>/``, a slot a worker.

As with local agents, what is true stands in files and in /proc: workers outlive us and are adopted, and
a lock that only the worker holds keeps a slot from ever having two. A worker that ends is started again,
later each time; a slot above the count is stopped (SIGTERM, then SIGKILL of its whole session).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog import private_files
from nomad_watchdog.clock import Clock, SystemClock
from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.errors import NotFoundError, TerminalError, WatchdogError
from nomad_watchdog.pools import Usage, View, average
from nomad_watchdog.schedulers.local import process
from nomad_watchdog.schedulers.local.files import bound_log, exclusive, translated, write_whole

log = logging.getLogger(__name__)

FIRST_S: Final = 1.0
LONGEST_S: Final = 30.0
STABLE_S: Final = 60.0
"""A worker that lived for so long has not failed to start."""
UP_S: Final = 1.0
"""A worker that lives for so long is up: the next one may be replaced."""
_MAX_LEFT: Final = 100
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """pool.json"""

    count: int
    worker_hash: str
    argv: list[str]
    env: dict[str, str]
    kill_timeout_s: float
    removed: bool = False


@dataclass(frozen=True, slots=True)
class _Worker:
    """worker.json. Times are wall-clock seconds, for they must mean something to other processes."""

    pid: int = 0
    pid_start: int = 0
    worker_hash: str = ""
    started_at: float = 0.0
    stopping_at: float = 0.0
    """0 = not told to stop."""
    crashes: int = 0
    """In a row, each soon after its start."""
    not_before: float = 0.0
    ended: str = ""

    @property
    def alive(self) -> bool:
        return process.is_same(self.pid, self.pid_start)


class LocalPools:
    """The driver for the backend `local`. `directory` must be on a local file system and ours alone."""

    def __init__(self, directory: Path, *, poll_s: float = 1.0, clock: Clock | None = None) -> None:
        self._directory = directory.absolute()
        self._poll_s = poll_s
        self._clock = clock or SystemClock()
        self._used: dict[str, dict[int, tuple[float, float]]] = {}
        self._look_again = asyncio.Event()

    async def close(self) -> None:
        return

    async def run(self, ours: Callable[[], bool]) -> None:
        """Mind the workers until cancelled, while `ours` says that this is our work."""
        while True:
            if ours():
                try:
                    await asyncio.to_thread(self.tick)
                except WatchdogError as error:
                    log.warning("pools not minded", extra={"reason": str(error)})
            self._look_again.clear()
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._look_again.wait()
            except TimeoutError:
                continue

    async def look(self) -> Mapping[str, View]:
        return await asyncio.to_thread(self._look)

    async def view(self, name: str) -> View | None:
        return (await self.look()).get(name)  # some files

    async def ensure(self, name: str, pool: PoolSettings) -> None:
        await asyncio.to_thread(self._ensure, name, pool)
        self._look_again.set()

    async def scale(self, name: str, count: int, reason: str) -> None:  # noqa: ARG002  # as the protocol
        await asyncio.to_thread(self._change, name, count, removed=False)
        self._look_again.set()

    async def remove(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._change, name, 0, removed=True)
        except NotFoundError:
            return
        self._look_again.set()

    async def usage(self, name: str, pool: PoolSettings) -> Usage | None:
        try:
            return await asyncio.to_thread(self._usage, name, pool)
        except OSError as error:
            raise translated(error, f"cannot measure pool {name}") from error

    # what is written down

    def _ensure(self, name: str, pool: PoolSettings) -> None:
        home = self._directory / name
        try:
            private_files.folder(home)
            with exclusive(home):
                before = _read(home / "pool.json", _Wanted)
                count = before.count if before is not None and not before.removed else pool.min
                wanted = _Wanted(
                    count=max(pool.min, min(pool.max, count)),
                    worker_hash=pool.worker_hash(""),
                    argv=list(pool.command),
                    env=dict(pool.env),
                    kill_timeout_s=pool.kill_timeout,
                )
                if wanted != before:
                    write_whole(home / "pool.json", json.dumps(asdict(wanted)))
        except OSError as error:
            raise translated(error, f"cannot keep pool {name}") from error

    def _change(self, name: str, count: int, *, removed: bool) -> None:
        home = self._directory / name
        try:
            if not (home / "pool.json").is_file():
                raise NotFoundError(f"no pool {name!r}")
            with exclusive(home):
                before = _read(home / "pool.json", _Wanted)
                if before is None or before.removed:
                    raise NotFoundError(f"no pool {name!r}")
                wanted = replace(before, count=count, removed=removed)
                write_whole(home / "pool.json", json.dumps(asdict(wanted)))
        except OSError as error:
            raise translated(error, f"cannot change pool {name}") from error

    def _homes(self) -> list[Path]:
        try:
            found = sorted(self._directory.iterdir()) if self._directory.is_dir() else []
        except OSError as error:
            raise translated(error, "cannot read the directory of pools") from error
        return [home for home in found if (home / "pool.json").is_file()]

    def _look(self) -> dict[str, View]:
        """What is wrong with one pool is told of that one only (S9)."""
        found = {}
        for home in self._homes():
            try:
                wanted = _read(home / "pool.json", _Wanted)
                if wanted is not None and not wanted.removed:
                    found[home.name] = self._view(home, wanted)
            except WatchdogError as error:
                found[home.name] = View(0, 0, trouble=str(error))
            except OSError as error:  # it goes while it is looked at, say
                found[home.name] = View(0, 0, trouble=f"cannot be read: {error.strerror}")
        return found

    def _view(self, home: Path, wanted: _Wanted) -> View:
        slots = [(slot, _worker(home, slot)) for slot in _slots(home)]
        running = [slot for slot, one in slots if one.alive and not one.stopping_at]
        ended = [f"worker {slot} {one.ended}" for slot, one in slots if one.crashes]
        return View(
            wanted.count,
            len(running),
            wanted.worker_hash,
            tuple(map(str, running)),
            "; ".join(ended[:3]) if len(running) < wanted.count else "",
        )

    # what is done

    def tick(self) -> None:
        """Blocking. Bring the processes of every pool one step nearer to what is written down."""
        for home in self._homes():
            try:
                with exclusive(home):
                    wanted = _read(home / "pool.json", _Wanted)
                    if wanted is None:
                        continue
                    self._mind(home, wanted)
                    if wanted.removed and not _slots(home):
                        # The folder and its lock stay: whoever makes the pool anew waits at that very lock.
                        (home / "pool.json").unlink()
            except (OSError, WatchdogError) as error:
                # One pool's full disk or damaged file is no other's trouble (S9).
                log.warning("pool not minded", extra={"pool": home.name, "reason": str(error)})

    def _mind(self, home: Path, wanted: _Wanted) -> None:
        slots = sorted({*_slots(home), *range(wanted.count)})
        workers = {slot: _worker(home, slot) for slot in slots}
        replacing = self._is_replacing(workers[slot] for slot in range(wanted.count))
        for slot, found in workers.items():
            private_files.folder(home / str(slot))
            before = one = self._buried(home, slot, found)
            extra, stale = slot >= wanted.count, one.worker_hash != wanted.worker_hash
            # Of those that are to be replaced, one at a time.
            if one.alive and (extra or one.stopping_at or (stale and not replacing)):
                one = self._stopped(one, wanted.kill_timeout_s)
                replacing = replacing or not extra
            elif not one.alive and not extra and self._clock.wall() >= one.not_before:
                one = self._started(home, slot, one, wanted)
            if not one.alive and extra and not process.is_locked(home / str(slot)):
                shutil.rmtree(home / str(slot), ignore_errors=True)
            elif one != before:
                write_whole(home / str(slot) / "worker.json", json.dumps(asdict(one)))
            bound_log(home / str(slot) / "agent.log")

    def _is_replacing(self, workers: Iterable[_Worker]) -> bool:
        """Whether some worker is not up, or only just: the next one is replaced when it is."""
        now = self._clock.wall()
        return any(
            not one.alive or one.stopping_at or 0 <= now - one.started_at < UP_S for one in workers
        )

    def _buried(self, home: Path, slot: int, one: _Worker) -> _Worker:
        """With what is to be said of a worker that has ended; written down, so that it counts once."""
        if not one.pid or one.alive:
            return one
        code = process.exit_code(one.pid)
        if code is not None:  # a child of ours that is not buried yet: its number means nobody else
            for pid in _sessions().get(one.pid, []):
                process.send(pid, process.start_time(pid), signal.SIGKILL)
        process.bury(one.pid)
        _end_rest(home / str(slot))
        lived_s = self._clock.wall() - one.started_at
        crashes = 0 if one.stopping_at or lived_s >= STABLE_S else one.crashes + 1
        wait_s = min(LONGEST_S, FIRST_S * 2.0 ** min(crashes - 1, 10)) if crashes else 0.0
        how = "ended" if code is None else f"ended with code {code}"
        found = _Worker(crashes=crashes, not_before=self._clock.wall() + wait_s, ended=how)
        write_whole(home / str(slot) / "worker.json", json.dumps(asdict(found)))
        return found

    def _stopped(self, one: _Worker, kill_timeout_s: float) -> _Worker:
        now = self._clock.wall()
        if not one.stopping_at:
            process.send(one.pid, one.pid_start, signal.SIGTERM)
            return replace(one, stopping_at=now)
        # A clock that was set back does not make a worker immortal.
        if not 0 <= now - one.stopping_at < kill_timeout_s:
            for pid in _sessions().get(one.pid, []):
                process.send(pid, process.start_time(pid), signal.SIGKILL)
        return one

    def _started(self, home: Path, slot: int, one: _Worker, wanted: _Wanted) -> _Worker:
        environment = {
            name: os.environ[name] for name in ("HOME", "LANG", "TZ") if name in os.environ
        }
        environment |= {"PATH": os.environ.get("PATH", os.defpath)} | wanted.env
        environment |= {"WORKER_POOL": home.name, "WORKER_SLOT": str(slot)}
        now = self._clock.wall()
        try:
            pid = process.spawn(home / str(slot), wanted.argv, environment)
        except BlockingIOError:
            # Started, but we died before it was written down; or children of a dead one live on.
            pid, _ = process.find(home / str(slot))
            return replace(one, pid=pid, pid_start=process.start_time(pid), started_at=now)
        except OSError as error:
            wait_s = min(LONGEST_S, FIRST_S * 2.0 ** min(one.crashes, 10))
            ended = f"can't be started: {error.strerror}"
            return _Worker(crashes=one.crashes + 1, not_before=now + wait_s, ended=ended)
        return _Worker(
            pid,
            process.start_time(pid),
            wanted.worker_hash,
            now,
            crashes=one.crashes,
            ended=one.ended,
        )

    # what it takes

    def _usage(self, name: str, pool: PoolSettings) -> Usage | None:
        home = self._directory / name
        workers = [_worker(home, slot) for slot in _slots(home)]
        running = [one for one in workers if one.alive and not one.stopping_at]
        before = self._used.get(name, {})
        seen: dict[int, tuple[float, float]] = {}
        shares: list[tuple[float, float]] = []
        sessions = _sessions()
        for one in running:
            spent_s, memory = _spent(sessions.get(one.pid, []))
            now = self._clock.monotonic()
            seen[one.pid] = (now, spent_s)
            if one.pid in before and now > before[one.pid][0]:
                at, spent_before = before[one.pid]
                cpu = 100.0 * max(0.0, spent_s - spent_before) / (now - at)
                shares.append((cpu, 100.0 * memory / pool.memory))
        self._used[name] = seen
        return average(shares, len(running))


def _slots(home: Path) -> list[int]:
    if not home.is_dir():
        return []
    return sorted(
        int(one.name) for one in home.iterdir() if one.name.isascii() and one.name.isdigit()
    )


def _worker(home: Path, slot: int) -> _Worker:
    return _read(home / str(slot) / "worker.json", _Worker) or _Worker()


def _read(path: Path, kind: type[Any]) -> Any:
    """None = there is none. Raises TerminalError for what this program did not write."""
    try:
        return kind(**loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise TerminalError(f"{path} is damaged; take it away, its workers go on") from error


def _end_rest(slot: Path) -> None:
    """Kill what a dead worker has left behind: it holds the slot's lock, so no other process is meant."""
    for _ in range(_MAX_LEFT):
        pid, _ = process.find(slot) if process.is_locked(slot) else (0, "")
        if not pid:
            return
        process.send(pid, process.start_time(pid), signal.SIGKILL)


def _sessions() -> dict[int, list[int]]:
    """Leader → the processes of its session: a worker leads one, with what it has started."""
    found: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:  # gone meanwhile
                continue
            found[int(text[text.rindex(")") + 2 :].split()[3])].append(int(entry.name))
    return found


def _spent(pids: Iterable[int]) -> tuple[float, int]:
    """(seconds of processor, bytes resident) of these processes together; see proc(5)."""
    spent, resident = 0.0, 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        fields = text[text.rindex(")") + 2 :].split()
        spent += (int(fields[11]) + int(fields[12])) / _TICKS
        resident += int(fields[21]) * _PAGE
    return spent, resident
