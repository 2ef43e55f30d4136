"""Pools as processes of this machine: ``<directory>/<pool>/<slot>/``, one slot per worker.

As with local agents, the state is in files and in /proc: workers survive the control plane and are adopted, and a
lock that only the worker holds prevents two workers in one slot. A worker that ends is restarted with an increasing
back-off. A slot above the count is stopped (SIGTERM, then SIGKILL of its whole session).
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
from typing import Final, TypeVar

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog import private_files
from nomad_watchdog.clock import Clock, SystemClock
from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.errors import NotFoundError, TerminalError, WatchdogError
from nomad_watchdog.pools import PoolStatus, Usage, average
from nomad_watchdog.schedulers.local import process
from nomad_watchdog.schedulers.local.files import bound_log, exclusive, translated, write_whole

log = logging.getLogger(__name__)

BACKOFF_INITIAL_S: Final = 1.0
BACKOFF_MAX_S: Final = 30.0
STABLE_S: Final = 60.0
"""A worker that ran for at least this time does not count as crashed."""
UP_S: Final = 1.0
"""A worker that has run for this time counts as started, so that the next one can be replaced."""
_MAX_LEFT: Final = 100
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_T = TypeVar("_T")


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
    """worker.json. Times are wall-clock seconds, because other processes read them."""

    pid: int = 0
    pid_start: int = 0
    worker_hash: str = ""
    started_at: float = 0.0
    stopping_at: float = 0.0
    """0 = no stop was requested."""
    crashes: int = 0
    """Consecutive crashes, each soon after the start."""
    not_before: float = 0.0
    ended: str = ""

    @property
    def alive(self) -> bool:
        return process.is_same(self.pid, self.pid_start)


class LocalPools:
    """The driver for the backend `local`. `directory` must be on a local file system, and only for these pools."""

    def __init__(self, directory: Path, *, poll_s: float = 1.0, clock: Clock | None = None) -> None:
        self._directory = directory.absolute()
        self._poll_s = poll_s
        self._clock = clock or SystemClock()
        self._used: dict[str, dict[int, tuple[float, float]]] = {}
        self._wake = asyncio.Event()

    async def close(self) -> None:
        return

    async def run(self, is_leader: Callable[[], bool]) -> None:
        """Start, stop and restart workers until cancelled, while `is_leader()`."""
        while True:
            if is_leader():
                try:
                    await asyncio.to_thread(self.tick)
                except WatchdogError as error:
                    log.warning("pools not reconciled", extra={"reason": str(error)})
            self._wake.clear()
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def list_pools(self) -> Mapping[str, PoolStatus]:
        return await asyncio.to_thread(self._list_pools)

    async def status(self, name: str) -> PoolStatus | None:
        return (await self.list_pools()).get(name)  # a few files

    async def ensure(self, name: str, pool: PoolSettings) -> None:
        await asyncio.to_thread(self._ensure, name, pool)
        self._wake.set()

    async def scale(self, name: str, count: int, reason: str) -> None:  # noqa: ARG002  # the protocol's signature
        await asyncio.to_thread(self._change, name, count, removed=False)
        self._wake.set()

    async def remove(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._change, name, 0, removed=True)
        except NotFoundError:
            return
        self._wake.set()

    async def usage(self, name: str, pool: PoolSettings) -> Usage | None:
        try:
            return await asyncio.to_thread(self._usage, name, pool)
        except OSError as error:
            raise translated(error, f"cannot measure pool {name}") from error

    # files

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
            raise translated(error, f"cannot write pool {name}") from error

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

    def _list_pools(self) -> dict[str, PoolStatus]:
        """A pool that cannot be read does not affect the others (S9)."""
        found = {}
        for home in self._homes():
            try:
                wanted = _read(home / "pool.json", _Wanted)
                if wanted is not None and not wanted.removed:
                    found[home.name] = self._status(home, wanted)
            except WatchdogError as error:
                found[home.name] = PoolStatus(0, 0, problem=str(error))
            except OSError as error:  # for example, the pool was removed at the same time
                found[home.name] = PoolStatus(0, 0, problem=f"cannot be read: {error.strerror}")
        return found

    def _status(self, home: Path, wanted: _Wanted) -> PoolStatus:
        slots = [(slot, _worker(home, slot)) for slot in _slots(home)]
        running = [slot for slot, one in slots if one.alive and not one.stopping_at]
        ended = [f"worker {slot} {one.ended}" for slot, one in slots if one.crashes]
        return PoolStatus(
            wanted.count,
            len(running),
            wanted.worker_hash,
            tuple(map(str, running)),
            "; ".join(ended[:3]) if len(running) < wanted.count else "",
        )

    # processes

    def tick(self) -> None:
        """Blocking. Bring the processes of every pool one step nearer to its desired state."""
        for home in self._homes():
            try:
                with exclusive(home):
                    wanted = _read(home / "pool.json", _Wanted)
                    if wanted is None:
                        continue
                    self._reconcile(home, wanted)
                    if wanted.removed and not _slots(home):
                        # The folder and its lock stay: creating the pool again uses the same lock.
                        (home / "pool.json").unlink()
            except (OSError, WatchdogError) as error:
                # A full disk or a damaged file of one pool must not affect the others (S9).
                log.warning("pool not reconciled", extra={"pool": home.name, "reason": str(error)})

    def _reconcile(self, home: Path, wanted: _Wanted) -> None:
        slots = sorted({*_slots(home), *range(wanted.count)})
        workers = {slot: _worker(home, slot) for slot in slots}
        replacing = self._is_replacing(workers[slot] for slot in range(wanted.count))
        for slot, found in workers.items():
            folder = home / str(slot)
            private_files.folder(folder)
            before = self._reaped(folder, found)
            extra = slot >= wanted.count
            after = self._next(folder, before, wanted, extra=extra, replacing=replacing)
            # Outdated workers are replaced one at a time.
            replacing = replacing or (bool(after.stopping_at) and not extra)
            if not after.alive and extra and not process.is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
            elif after != before:
                write_whole(folder / "worker.json", json.dumps(asdict(after)))
            bound_log(folder / "agent.log")

    def _next(
        self, folder: Path, one: _Worker, wanted: _Wanted, *, extra: bool, replacing: bool
    ) -> _Worker:
        """Start or stop a worker if necessary. `replacing`: another worker of the pool is being replaced."""
        outdated = one.worker_hash != wanted.worker_hash and not replacing
        if one.alive and (extra or one.stopping_at or outdated):
            return self._stopped(one, wanted.kill_timeout_s)
        if not one.alive and not extra and self._clock.wall() >= one.not_before:
            return self._started(folder, one, wanted)
        return one

    def _is_replacing(self, workers: Iterable[_Worker]) -> bool:
        """Whether a worker does not run, or has just started. The next one is replaced only after that."""
        now = self._clock.wall()
        return any(
            not one.alive or one.stopping_at or 0 <= now - one.started_at < UP_S for one in workers
        )

    def _reaped(self, folder: Path, one: _Worker) -> _Worker:
        """The worker; if it has ended, with its crashes and back-off, which are stored so that it counts once."""
        if not one.pid or one.alive:
            return one
        code = process.exit_code(one.pid)
        if (
            code is not None
        ):  # a child of this process that is not reaped, so its pid is not used again yet
            for pid in _sessions().get(one.pid, []):
                process.send(pid, process.start_time(pid), signal.SIGKILL)
        process.reap(one.pid)
        _kill_rest(folder)
        lived_s = self._clock.wall() - one.started_at
        crashes = 0 if one.stopping_at or lived_s >= STABLE_S else one.crashes + 1
        wait_s = _backoff_s(crashes - 1) if crashes else 0.0
        how = "ended" if code is None else f"ended with code {code}"
        found = _Worker(crashes=crashes, not_before=self._clock.wall() + wait_s, ended=how)
        write_whole(folder / "worker.json", json.dumps(asdict(found)))
        return found

    def _stopped(self, one: _Worker, kill_timeout_s: float) -> _Worker:
        now = self._clock.wall()
        if not one.stopping_at:
            process.send(one.pid, one.pid_start, signal.SIGTERM)
            return replace(one, stopping_at=now)
        # The comparison with 0: the clock may have been set back since the stop was requested.
        if not 0 <= now - one.stopping_at < kill_timeout_s:
            for pid in _sessions().get(one.pid, []):
                process.send(pid, process.start_time(pid), signal.SIGKILL)
        return one

    def _started(self, folder: Path, one: _Worker, wanted: _Wanted) -> _Worker:
        environment = {
            name: os.environ[name] for name in ("HOME", "LANG", "TZ") if name in os.environ
        }
        environment |= {"PATH": os.environ.get("PATH", os.defpath)} | wanted.env
        environment |= {"WORKER_POOL": folder.parent.name, "WORKER_SLOT": folder.name}
        now = self._clock.wall()
        try:
            pid = process.spawn(folder, wanted.argv, environment)
        except BlockingIOError:
            # Its start was not stored because the control plane crashed, or children of a dead worker still run.
            pid, _ = process.find(folder)
            return replace(one, pid=pid, pid_start=process.start_time(pid), started_at=now)
        except OSError as error:
            wait_s = _backoff_s(one.crashes)
            ended = f"cannot be started: {error.strerror}"
            return _Worker(crashes=one.crashes + 1, not_before=now + wait_s, ended=ended)
        return _Worker(
            pid,
            process.start_time(pid),
            wanted.worker_hash,
            now,
            crashes=one.crashes,
            ended=one.ended,
        )

    # resource usage

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


def _backoff_s(earlier_crashes: int) -> float:
    return float(min(BACKOFF_MAX_S, BACKOFF_INITIAL_S * 2.0 ** min(earlier_crashes, 10)))


def _slots(home: Path) -> list[int]:
    if not home.is_dir():
        return []
    return sorted(
        int(one.name) for one in home.iterdir() if one.name.isascii() and one.name.isdigit()
    )


def _worker(home: Path, slot: int) -> _Worker:
    return _read(home / str(slot) / "worker.json", _Worker) or _Worker()


def _read(path: Path, kind: type[_T]) -> _T | None:
    """None = no such file. Raises TerminalError for a file that this program did not write."""
    try:
        return kind(**loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise TerminalError(f"{path} is damaged; remove it (its workers keep running)") from error


def _kill_rest(slot: Path) -> None:
    """Kill the remaining processes of a dead worker. They hold the slot's lock, so no other process is killed."""
    for _ in range(_MAX_LEFT):
        pid, _ = process.find(slot) if process.is_locked(slot) else (0, "")
        if not pid:
            return
        process.send(pid, process.start_time(pid), signal.SIGKILL)


def _sessions() -> dict[int, list[int]]:
    """Session leader → the processes of its session. Each worker leads a session."""
    found: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            found[int(text[text.rindex(")") + 2 :].split()[3])].append(int(entry.name))
    return found


def _spent(pids: Iterable[int]) -> tuple[float, int]:
    """(CPU seconds, resident bytes) of these processes together; see proc(5)."""
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
