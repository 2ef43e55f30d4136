"""A registry of a third party, its entry point, and a user of the interface."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nomad_watchdog.errors import NoRegistryError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Presence
from nomad_watchdog.registry import CommitGuard, Registry, RegistryDocument, RegistrySnapshot
from nomad_watchdog.registry.sqlite import SqliteRegistry


class MemoryRegistry:
    """Records in memory, without durability."""

    def __init__(self) -> None:
        self._installation = ""
        self._records: dict[Slug, DeviceRecord] = {}
        self._documents: dict[str, RegistryDocument] = {}
        self._index = 0

    async def initialise(self, installation: str = "") -> str:
        self._installation = self._installation or installation or "new"
        return self._installation

    async def installation(self) -> str:
        if not self._installation:
            raise NoRegistryError("not initialised")
        return self._installation

    async def read(self) -> RegistrySnapshot:
        return RegistrySnapshot(dict(self._records), self._index)

    async def get(self, slug: Slug) -> DeviceRecord | None:
        return self._records.get(slug)

    async def commit(
        self, records: Sequence[DeviceRecord], guards: Sequence[CommitGuard] = ()
    ) -> Sequence[DeviceRecord | None]:
        assert all(guard.key for guard in guards)
        return [self._store(record) for record in records]

    def _store(self, record: DeviceRecord) -> DeviceRecord | None:
        stored = self._records.get(record.slug)
        if record.index != (stored.index if stored is not None else 0):
            return None
        self._index += 1
        self._records[record.slug] = replace(record, index=self._index)
        return self._records[record.slug]

    async def forget(self, records: Sequence[DeviceRecord]) -> Sequence[bool]:
        return [self._records.pop(record.slug, None) is not None for record in records]

    async def watch(self, index: int) -> AsyncIterator[RegistrySnapshot]:
        if index != self._index:
            yield await self.read()

    async def document(self, name: str) -> RegistryDocument:
        return self._documents.get(name, RegistryDocument())

    async def commit_document(
        self, name: str, document: RegistryDocument
    ) -> RegistryDocument | None:
        if document.index != (await self.document(name)).index:
            return None
        self._documents[name] = replace(document, index=document.index + 1)
        return self._documents[name]

    async def check_writable(self) -> None: ...

    async def close(self) -> None:
        self._records.clear()

    @property
    def poisoned(self) -> Mapping[str, str]:
        return {}


def entry_point(path: str) -> Registry:
    """Any of these is a registry."""
    return SqliteRegistry(path=Path(path)) if path else MemoryRegistry()


async def use(registry: Registry) -> list[str]:
    await registry.initialise()
    snapshot: RegistrySnapshot = await registry.read()
    present = [one for one in snapshot.records.values() if one.presence is Presence.PRESENT]
    stored = await registry.commit(present, guards=[CommitGuard("shard/0", "session")])
    lost: list[str] = [
        one.device.id for one, now in zip(present, stored, strict=True) if now is None
    ]
    document = await registry.document("pauses")
    if await registry.commit_document("pauses", replace(document, body=b"{}")) is None:
        lost.append("pauses")
    return [*lost, *registry.poisoned]
