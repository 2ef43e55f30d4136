"""An in-memory registry and scheduler, for faults that the real ones can't be made to have.

They behave correctly: both pass the suites that the real ones pass (`testing.conformance` and
`tests/registry`). Each is a server (`Store`, `Cluster`) that changes in one step, and a client that
reaches it over a `Line`. All faults between the two are faults of the line.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import TypeVar

from nomad_watchdog.errors import StaleError, TransientError, UserError
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement
from nomad_watchdog.registry import CommitGuard, RegistryDocument, RegistrySnapshot, check_document
from nomad_watchdog.registry.codec import Decoder, decode, encode
from nomad_watchdog.schedulers import Capabilities, Capacity, ClosedHost, Hint, Snapshot, named
from tests.simulation.cluster import Cluster, News

__all__ = ["Cluster", "FakeRegistry", "FakeScheduler", "Line", "Store"]

REFUSED = "refused"
"""Variable of a class that can't be prepared; its text is the reason."""
T = TypeVar("T")
Written = Callable[[DeviceRecord | None, DeviceRecord], None]


class Line:
    """The connection from a client to a server and back. This one is perfect; see
    `simulation.BadLine`."""

    async def call(self, what: str, effect: Callable[[], T]) -> T:  # for subclasses
        """Apply `effect` at the server, atomically, and return its answer."""
        await asyncio.sleep(0)
        return effect()

    async def hint(self, what: str) -> bool:  # for subclasses
        """Whether an event reaches the watcher. False = it was lost, undetectably.

        Raises TransientError when the connection broke, which the watcher does notice.
        """
        await asyncio.sleep(0)
        return True


class Store:
    """What a registry stores: one row per device, and one counter for all writes."""

    def __init__(self) -> None:
        self.installation = ""
        self.index = 0
        self.rows: dict[Slug, tuple[int, bytes]] = {}
        self.documents: dict[str, RegistryDocument] = {}
        self.news = News()
        self.on_write: Written = lambda _before, _after: None
        self.on_document: Callable[[str], None] = lambda _name: None
        self.on_forget: Callable[[DeviceRecord], None] = lambda _record: None

    def check(self) -> str:
        """The installation's id; UserError when there is none."""
        if not self.installation:
            raise UserError("this store was never initialised: run `nomad-watchdog init`")
        return self.installation

    def initialise(self, installation: str) -> str:
        self.installation = self.installation or installation
        return self.installation

    def listing(self) -> tuple[int, list[tuple[str, str, int, bytes]]]:
        self.check()
        return self.index, [(slug, slug, at, body) for slug, (at, body) in self.rows.items()]

    def row(self, slug: Slug) -> tuple[int, bytes] | None:
        self.check()
        return self.rows.get(slug)

    def record(self, slug: Slug) -> DeviceRecord | None:
        """The stored record of a device."""
        row = self.rows.get(slug)
        return None if row is None else decode(row[1], slug=slug, index=row[0])

    def document(self, name: str) -> RegistryDocument:
        self.check()
        return self.documents.get(name, RegistryDocument())

    def commit_document(self, name: str, document: RegistryDocument) -> RegistryDocument | None:
        """Compare and set one document."""
        if self.document(name).index != document.index:
            return None
        self.index += 1
        stored = self.documents[name] = RegistryDocument(document.body, self.index)
        self.on_document(name)
        return stored

    def commit(self, rows: Sequence[tuple[Slug, int, bytes]]) -> list[int | None]:
        """Compare and set each row; the new index, or None where it lost."""
        self.check()
        result: list[int | None] = []
        for slug, expected, body in rows:
            old = self.rows.get(slug)
            if (old[0] if old is not None else 0) != expected:
                result.append(None)
                continue
            before = self.record(slug)
            self.index += 1
            self.rows[slug] = (self.index, body)
            result.append(self.index)
            self.on_write(before, decode(body, slug=slug, index=self.index))
        if any(index is not None for index in result):
            self.news.tell(frozenset(slug for slug, _, _ in rows))
        return result

    def forget(self, rows: Sequence[tuple[Slug, int]]) -> list[bool]:
        """Delete each row whose index is unchanged."""
        self.check()
        gone = [(row := self.rows.get(slug)) is None or row[0] == at for slug, at in rows]
        for (slug, _), won in zip(rows, gone, strict=True):
            if won and slug in self.rows:
                record = self.record(slug)
                assert record is not None
                self.on_forget(record)
                del self.rows[slug]
                self.index += 1
        if any(gone):
            self.news.tell(frozenset(slug for slug, _ in rows))
        return gone


class FakeRegistry:
    """A registry over a store in memory."""

    def __init__(self, store: Store, line: Line | None = None) -> None:
        self._store = store
        self._line = line or Line()
        self._decoder = Decoder()

    @property
    def poisoned(self) -> Mapping[str, str]:
        return self._decoder.poisoned

    async def initialise(self, installation: str = "") -> str:
        mine = installation or str(uuid.uuid4())
        return await self._line.call("registry.init", lambda: self._store.initialise(mine))

    async def installation(self) -> str:
        return await self._line.call("registry.get", self._store.check)

    async def read(self) -> RegistrySnapshot:
        index, rows = await self._line.call("registry.read", self._store.listing)
        return RegistrySnapshot(self._decoder.decode(rows), index)

    async def get(self, slug: Slug) -> DeviceRecord | None:
        row = await self._line.call("registry.get", lambda: self._store.row(slug))
        return None if row is None else decode(row[1], slug=slug, index=row[0])

    async def commit(
        self,
        records: Sequence[DeviceRecord],
        guards: Sequence[CommitGuard] = (),  # there are no locks in this store
    ) -> Sequence[DeviceRecord | None]:
        rows = [(record.slug, record.index, encode(record)) for record in records]
        if not rows:
            return ()
        indexes = await self._line.call("registry.commit", lambda: self._store.commit(rows))
        return [
            None if index is None else decode(body, slug=slug, index=index)
            for (slug, _, body), index in zip(rows, indexes, strict=True)
        ]

    async def forget(self, records: Sequence[DeviceRecord]) -> Sequence[bool]:
        rows = [(record.slug, record.index) for record in records]
        if not rows:
            return ()
        return await self._line.call("registry.forget", lambda: self._store.forget(rows))

    async def watch(self, index: int) -> AsyncIterator[RegistrySnapshot]:
        self._store.check()
        known = index
        with self._store.news.ear() as ear:
            while True:
                if self._store.index != known and await self._line.hint("registry.watch"):
                    found, rows = await self._line.call("registry.watch", self._store.listing)
                    if found < known:
                        self._decoder.forget()
                    known = found
                    yield RegistrySnapshot(self._decoder.decode(rows), found)
                    if self._store.index != known:
                        continue
                await ear.wait()

    async def document(self, name: str) -> RegistryDocument:
        check_document(name)
        return await self._line.call("registry.document", lambda: self._store.document(name))

    async def commit_document(
        self, name: str, document: RegistryDocument
    ) -> RegistryDocument | None:
        check_document(name, document.body)
        return await self._line.call(
            "registry.commit_document", lambda: self._store.commit_document(name, document)
        )

    async def check_writable(self) -> None:
        await self._line.call("registry.check_writable", self._store.check)

    async def close(self) -> None:
        """Nothing to release."""


class FakeScheduler:
    """A scheduler over a cluster in memory: restarts in place, moves agents of a lost node."""

    name = "fake"
    capabilities = Capabilities(steers=True)

    def __init__(self, cluster: Cluster, line: Line | None = None, owner: str = "") -> None:
        self._cluster = cluster
        self._line = line or Line()
        self._owner = owner
        self._index = 0
        self._read: Snapshot | None = None

    async def prepare(
        self,
        specs: Collection[AgentSpec],
        *,
        shards: Collection[Shard] | None = None,  # a class is prepared as a whole
        trials: Collection[AgentSpec] = (),
    ) -> Mapping[str, str]:
        refused = {
            name: one.variables[REFUSED]
            for name, one in named(specs, trials)
            if REFUSED in one.variables
        }
        names = sorted(one.agent_class for one in specs if one.agent_class not in refused)
        await self._line.call("scheduler.prepare", lambda: self._cluster.prepare(names))
        return refused

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        return await self._line.call(
            "scheduler.ensure", lambda: self._cluster.ensure(record, epoch, spec, self._owner)
        )

    async def retire(self, placement: Placement, grace_s: float) -> None:
        await self._line.call(
            "scheduler.retire", lambda: self._cluster.retire(placement.ref, grace_s)
        )

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        asked = None if only is None else frozenset(only)
        index, found = await self._line.call(
            "scheduler.snapshot", lambda: self._cluster.listing(asked)
        )
        if index < self._index and only is None:
            self._index = 0
            raise StaleError(f"the scheduler's index went back to {index}")
        self._index = max(self._index, index)
        seen = Snapshot(found, index, asked, closed_hosts=self._closed_hosts())
        if only is None:
            self._read = seen
        return seen

    def _closed_hosts(self) -> Mapping[str, ClosedHost]:
        closed, nodes = self._cluster.closed, self._cluster.nodes
        is_last = not any(up and name not in closed for name, up in nodes.items())
        return {
            name: ClosedHost(draining, "draining" if draining else "ineligible", is_last=is_last)
            for name, draining in closed.items()
        }

    async def unchanged_since(self, snapshot: Snapshot) -> bool:
        index, _ = await self._line.call(
            "scheduler.snapshot", lambda: self._cluster.listing(frozenset())
        )
        return snapshot is self._read and snapshot.index == index

    async def open_hosts(self) -> frozenset[str]:
        def up() -> frozenset[str]:
            return frozenset(name for name, heard in self._cluster.nodes.items() if heard)

        return await self._line.call("scheduler.snapshot", up)

    async def watch(self) -> AsyncIterator[Hint]:
        with self._cluster.news.ear() as ear:
            while True:
                yield Hint(None)
                try:
                    while True:
                        slugs = await ear.wait()
                        if await self._line.hint("scheduler.watch"):
                            calm = self._cluster.is_calm(slugs)
                            yield Hint(slugs, self._cluster.index, calm=calm)
                except TransientError:
                    await asyncio.sleep(0.5)  # reconnected: events from before are lost

    async def capacity(self) -> Capacity:
        return await self._line.call("scheduler.capacity", self._cluster.capacity)

    async def sweep(self, dead: Collection[Placement]) -> int:
        refs = sorted(one.ref for one in dead)
        return await self._line.call("scheduler.sweep", lambda: self._cluster.sweep(refs))

    async def close(self) -> None:
        """Nothing to release; agents keep running."""
