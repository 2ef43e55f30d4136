"""The backend `local`: agents as processes of this machine, without any server.

The state is in ``<directory>/<slug>/placement.json`` and in /proc, never only in memory: agents survive the control
plane, a new scheduler adopts them, and several schedulers may use one directory. Crashed agents are restarted while
any scheduler runs, in any process; those that crash while none runs are restarted when the next one starts.

Indexes are microseconds of wall-clock time, and always increase within one process. After the machine's clock was
set back, a new process may start with a lower index, after which readers start again (S8).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator, Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nomad_watchdog import private_files
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import TransientError, UserError
from nomad_watchdog.ids import DeviceId, Shard, Slug
from nomad_watchdog.model import (
    AgentSpec,
    DeviceRecord,
    Epoch,
    Placement,
    PlacementState,
    WallTime,
)
from nomad_watchdog.schedulers import Capabilities, Capacity, Hint, Snapshot, named
from nomad_watchdog.schedulers.local import _placement as steps
from nomad_watchdog.schedulers.local import process
from nomad_watchdog.schedulers.local._zygote import Parents
from nomad_watchdog.schedulers.local.files import (
    CorruptError,
    Entry,
    read_api,
    read_entry,
    translated,
)

log = logging.getLogger(__name__)

_MAX_HINTS: Final = 1024
_WITH_PROCESS: Final = {PlacementState.RUNNING, PlacementState.STOPPING}


@dataclass(slots=True)
class _Monitored:
    """What this scheduler monitors for one live placement."""

    pid: int = 0
    descriptor: int = -1
    timer: asyncio.TimerHandle | None = None


class LocalScheduler:
    """`directory` must be on a local file system (flock), and only for these agents."""

    name = "local"
    capabilities = Capabilities()

    def __init__(  # noqa: PLR0913  # keyword settings of an entry point; each but one has a default
        self,
        *,
        directory: str | Path,
        python: str = sys.executable,
        token_file: str = "",
        backoff_initial_s: float = 1.0,
        backoff_max_s: float = 30.0,
        stable_after_s: float = 60.0,
        poll_s: float = 1.0,
        fork: bool = True,
    ) -> None:
        """`poll_s`: interval at which changes by other processes are detected. `fork`: fork agents from one parent
        process, so that they share memory."""
        home = Path(directory).absolute()
        self._parents = Parents(python=python, directory=home, fork=fork)
        self._settings = steps.PlacementSettings(
            home,
            python,
            token_file,
            backoff_initial_s,
            backoff_max_s,
            stable_after_s,
            self._parents,
        )
        self._poll_s = poll_s
        self._monitored: dict[Slug, _Monitored] = {}
        self._seen: dict[Slug, int] = {}
        self._addresses: dict[Slug, tuple[int, tuple[str, ...]]] = {}
        """Of each device: an epoch, and the addresses that the agent of that epoch reports to."""
        self._watchers: set[asyncio.Queue[Hint]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: dict[Slug, bool] = {}
        self._last_index = 0
        self._open = False
        self._closed = False

    @staticmethod
    def check_spec(spec: AgentSpec) -> None:
        """Raises UserError for an invalid command."""
        steps.command_of(spec)

    async def prepare(
        self,
        specs: Collection[AgentSpec],
        *,
        shards: Collection[Shard] | None = None,  # noqa: ARG002  # nothing is shared
        trials: Collection[AgentSpec] = (),
    ) -> Mapping[str, str]:
        refused: dict[str, str] = {}
        for name, spec in named(specs, trials):
            try:
                self.check_spec(spec)
            except UserError as error:
                refused[name] = str(error)
        await self._ready()
        return refused

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        await self._ready()
        entry = await asyncio.to_thread(steps.ensure, self._settings, record, epoch, spec)
        self._monitor(record.slug, entry)
        return self._index()

    async def retire(self, placement: Placement, grace_s: float) -> None:
        await self._ready()
        slug = placement.slug
        entry = await asyncio.to_thread(
            steps.retire, self._settings, slug, placement.epoch, grace_s
        )
        self._monitor(slug, entry)

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        await self._ready()
        index = self._index()
        slugs = None if only is None else frozenset(only)
        found = await asyncio.to_thread(self._read_all, slugs)
        return Snapshot(found, index, slugs)

    async def watch(self) -> AsyncGenerator[Hint, None]:
        await self._ready()
        queue: asyncio.Queue[Hint] = asyncio.Queue(_MAX_HINTS)
        self._watchers.add(queue)
        try:
            yield Hint(None, self._index())
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    async def capacity(self) -> Capacity:
        try:
            free = await asyncio.to_thread(os.statvfs, self._settings.directory)
        except OSError as error:
            raise translated(error, "cannot read the directory of agents") from error
        if free.f_bavail * free.f_frsize < 64 * 1024 * 1024:
            return Capacity(room=False, reason="less than 64 MiB free in the directory of agents")
        return Capacity(room=True)

    async def sweep(self, dead: Collection[Placement]) -> int:
        count = 0
        for one in dead:
            try:
                count += await asyncio.to_thread(steps.sweep, self._settings, one.slug, one.epoch)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise translated(error, f"cannot delete {one.slug}") from error
        return count

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slug in list(self._monitored):
            self._stop_monitoring(slug)
        await asyncio.to_thread(self._parents.close)

    async def _ready(self) -> None:
        """On first use: create the directory, adopt the agents that run in it, and start polling."""
        if self._closed:
            raise TransientError("this local scheduler is closed")
        if self._open:
            return
        try:
            private_files.folder(self._settings.directory)
            if not os.access(self._settings.directory, os.R_OK | os.W_OK | os.X_OK):
                raise UserError(f"{self._settings.directory} must be readable and writable")
        except OSError as error:
            raise translated(error, f"cannot use {self._settings.directory}") from error
        self._open = True
        self._spawn(self._poll())

    def _spawn(self, work: Coroutine[object, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _poll(self) -> None:
        """Detect changes by other processes, and limit the size of logs. After failures the next success is a resync."""
        failing = False
        while True:
            try:
                for slug in await asyncio.to_thread(self._changed):
                    self._step_soon(slug)
                if failing:
                    self._publish(Hint(None, self._index()))
                failing = False
            except OSError as error:
                if not failing:
                    log.warning("cannot read the agents' directory", extra={"reason": str(error)})
                failing = True
            await asyncio.sleep(self._poll_s)

    def _changed(self) -> list[Slug]:
        found: dict[Slug, int] = {}
        big = []
        for slug in steps.slugs(self._settings):
            home = self._settings.home(slug)
            with suppress(FileNotFoundError):
                found[slug] = (home / "placement.json").stat().st_mtime_ns
                if (home / "agent.log").stat().st_size > 1024 * 1024:
                    big.append(slug)
        names = found.keys() | self._seen.keys()
        changed = [slug for slug in names if found.get(slug) != self._seen.get(slug)]
        self._seen = found
        for slug in self._addresses.keys() - found.keys():
            self._addresses.pop(slug, None)
        return [*changed, *(slug for slug in big if slug not in changed)]

    def _step_soon(self, slug: Slug) -> None:
        """Run one step at a time per device. If another one is requested during a step, run it afterwards."""
        if self._closed:
            return
        if slug in self._busy:
            self._busy[slug] = True
            return
        self._busy[slug] = False
        self._spawn(self._step(slug))

    async def _step(self, slug: Slug) -> None:
        try:
            entry = await asyncio.to_thread(steps.step, self._settings, slug)
        except FileNotFoundError:
            entry = None
        except OSError as error:
            log.warning("cannot process a device", extra={"slug": slug, "reason": str(error)})
            asyncio.get_running_loop().call_later(self._poll_s, self._step_soon, slug)
            return
        finally:
            again = self._busy.pop(slug, False)
        self._monitor(slug, entry)
        if again:
            self._step_soon(slug)

    def _monitor(self, slug: Slug, entry: Entry | None) -> None:
        """Publish a hint, and arrange that a pidfd or a timer triggers the next step of the device."""
        if self._closed:
            return
        self._publish(Hint(frozenset({slug}), self._index()))
        if entry is None or entry.state == PlacementState.DEAD:
            self._stop_monitoring(slug)
            return
        monitored = self._monitored.setdefault(slug, _Monitored())
        if monitored.timer is not None:
            monitored.timer.cancel()
            monitored.timer = None
        loop = asyncio.get_running_loop()
        if entry.act_at:
            longest = max(self._settings.backoff_max_s, 600.0)
            wait = min(longest, max(0.01, entry.act_at - SystemClock().wall()))
            if entry.state == PlacementState.STOPPING:
                wait = max(wait, 0.05)
            monitored.timer = loop.call_later(wait, self._step_soon, slug)
        pid = entry.pid if entry.state in _WITH_PROCESS else 0
        if pid == monitored.pid:
            return
        self._unwatch(monitored)
        if pid:
            self._watch_pid(slug, monitored, pid)

    def _watch_pid(self, slug: Slug, monitored: _Monitored, pid: int) -> None:
        """A pidfd becomes readable when the process ends, also if it is not a child."""
        try:
            monitored.descriptor = os.pidfd_open(pid)
        except OSError:  # it has ended, or there are no descriptors left: check again soon
            loop = asyncio.get_running_loop()
            monitored.timer = loop.call_later(0.2, self._step_soon, slug)
            return
        monitored.pid = pid

        def ended() -> None:
            self._unwatch(monitored)
            self._step_soon(slug)

        asyncio.get_running_loop().add_reader(monitored.descriptor, ended)

    def _unwatch(self, monitored: _Monitored) -> None:
        if monitored.descriptor >= 0:
            asyncio.get_running_loop().remove_reader(monitored.descriptor)
            os.close(monitored.descriptor)
        monitored.descriptor, monitored.pid = -1, 0

    def _stop_monitoring(self, slug: Slug) -> None:
        monitored = self._monitored.pop(slug, None)
        if monitored is None:
            return
        if monitored.timer is not None:
            monitored.timer.cancel()
        self._unwatch(monitored)

    def _publish(self, hint: Hint) -> None:
        for queue in self._watchers:
            if queue.full():  # a slow reader gets one resync instead of the hints that it missed
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(Hint(None, hint.index))
            else:
                queue.put_nowait(hint)

    def _index(self) -> int:
        self._last_index = max(self._last_index + 1, int(SystemClock().wall() * 1e6))
        return self._last_index

    def _read_all(self, only: frozenset[Slug] | None) -> dict[Slug, tuple[Placement, ...]]:
        found: dict[Slug, tuple[Placement, ...]] = {}
        try:
            for slug in steps.slugs(self._settings):
                if only is not None and slug not in only:
                    continue
                entry = self._read_one(slug)
                if entry is not None:
                    found[slug] = (placement_of(entry, self._api(entry)),)
        except OSError as error:
            raise TransientError(f"cannot read all placements: {error.strerror}") from error
        return found

    def _api(self, entry: Entry) -> tuple[str, ...]:
        known = self._addresses.get(entry.slug)
        if known is None or known[0] != entry.epoch:
            api = read_api(self._settings.home(entry.slug))
            known = self._addresses[entry.slug] = entry.epoch, api
        return known[1]

    def _read_one(self, slug: Slug) -> Entry | None:
        home = self._settings.home(slug)
        try:
            return read_entry(home)
        except CorruptError:
            return steps.step(self._settings, slug)


def placement_of(entry: Entry, api: tuple[str, ...] = ()) -> Placement:
    """An entry as a placement. A process that has just ended does not count as running."""
    state = PlacementState(entry.state)
    reason = entry.reason
    if state is PlacementState.RUNNING and not process.is_same(entry.pid, entry.pid_start):
        state, reason = PlacementState.RESTARTING, "the process has ended"
    return Placement(
        slug=entry.slug,
        device_id=DeviceId(entry.device_id),
        epoch=Epoch(entry.epoch),
        agent_class=entry.agent_class,
        spec_hash=entry.spec_hash,
        state=state,
        ref=f"{entry.slug}:{entry.epoch}",
        instances=(entry.instance,) if entry.state in _WITH_PROCESS else (),
        node=os.uname().nodename,
        restarts=entry.restarts,
        reason=reason,
        created_at=WallTime(entry.created_at),
        api=api,
    )
