"""The lease of a machine's own registry: one lock file beside it, for all shards.

The kernel releases it when its holder ends, however it ends; a process that waits acquires it a moment later.
A holder that is frozen keeps it: on one machine it can't be distinguished from a slow one.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog import private_files
from nomad_watchdog.clock import Clock
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.registry import CommitGuard
from nomad_watchdog.replicas.leases import Lease, Replica, Term

_POLL_S: Final = 0.2


class FileLeases:
    """Holds all shards or none. `api`: our address, for `nomad-watchdog leader`; `advertise`: the one that agents
    get, "" = the same."""

    def __init__(  # settings by name
        self,
        path: Path,
        *,
        shards: int,
        replica: str,
        api: str,
        clock: Clock,
        advertise: str = "",
    ) -> None:
        self.shards = shards
        self.replica = replica
        self.advertise = advertise or api
        self.problem = ""
        self.changed = asyncio.Event()
        self._path = path
        self._api = api
        self._clock = clock
        self._config = ""
        self._file: IO[str] | None = None
        self._terms: dict[Shard, Term] = {}
        self._since = clock.wall()

    def terms(self) -> Mapping[Shard, Term]:
        return self._terms

    def guards(self, slugs: Collection[Slug]) -> Sequence[CommitGuard]:  # noqa: ARG002  # the kernel guards
        return ()

    def all(self) -> Sequence[Lease]:
        holder = self._holder()
        return [
            Lease(Shard(number), *holder, term=self._term_of(number))
            for number in range(self.shards)
        ]

    def _term_of(self, number: int) -> int:
        term = self._terms.get(Shard(number))
        return term.number if term is not None else 0

    @property
    def current(self) -> bool:
        return True

    def replicas(self) -> Sequence[Replica]:
        return []

    def configs(self) -> Sequence[str] | None:
        """Of the holder of the lease, where that is another process."""
        fields = self._content()
        if self._terms or fields is None or not self._is_held():
            return []
        return [str(fields.get("config", ""))]

    async def announce(self, config: str) -> None:
        self._config = config
        if self._terms and self._file is not None:
            self._write(self._file, next(iter(self._terms.values())).number)

    def knows_all_replicas(self) -> bool:
        return bool(self._terms)

    async def run(self) -> None:
        file = self._open()
        self._file = file
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder, api, _ = self._holder()
                self.problem = f"{holder or 'another process'} leads{f' ({api})' if api else ''}"
                await asyncio.sleep(_POLL_S)
        term = Term(self._next_number(file), self._clock.monotonic())
        self.problem = ""
        self._terms = dict.fromkeys(map(Shard, range(self.shards)), term)
        self.changed.set()
        await asyncio.Event().wait()

    def _open(self) -> IO[str]:
        try:
            private_files.folder(self._path.parent)
            private_files.file(self._path)
            return os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
        except OSError as error:
            raise UserError(f"the lease file {self._path} can't be used: {error}") from error

    def _next_number(self, file: IO[str]) -> int:
        number = 1
        with suppress(ValueError, KeyError, TypeError):
            number = int(loads(file.read())["term"]) + 1
        self._since = self._clock.wall()
        self._write(file, number)
        return number

    def _write(self, file: IO[str], number: int) -> None:
        fields = {
            "v": 1,
            "replica": self.replica,
            "api": self._api,
            "since": self._since,
            "term": number,
            "config": self._config,
        }
        # In place: a new file under the same name would be another lock.
        file.seek(0)
        file.write(json.dumps(fields))
        file.truncate()
        file.flush()

    def _holder(self) -> tuple[str, str, float]:
        """The process that wrote the file last, if its lock is held."""
        try:
            fields = self._content() or {}
            known = str(fields["replica"]), str(fields["api"]), float(fields["since"])
        except (ValueError, KeyError, TypeError):
            return "", "", 0.0
        return known if self._terms or self._is_held() else ("", "", 0.0)

    def _content(self) -> Mapping[str, Any] | None:
        """The file's content; None = there is none that can be read."""
        try:
            fields = loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        return fields if isinstance(fields, dict) else None

    def _is_held(self) -> bool:
        try:
            with self._path.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def release(self) -> None:
        self._terms = {}
        self.changed.set()
        if self._file is not None:
            self._file.close()
            self._file = None
