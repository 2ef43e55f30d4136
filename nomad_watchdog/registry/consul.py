"""The registry in Consul's key-value store: one key per device, written by transactions of `cas`.

Keys: ``<prefix>/meta`` is the sentinel, ``<prefix>/devices/meta`` its copy inside what is read, and
``<prefix>/devices/<bucket>/<slug>`` a device, ``<prefix>/documents/<name>`` a document. The copy is there because Consul answers a prefix read
without rights just as it answers an empty prefix (404): a read that does not show it proves nothing.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.clients.consul import (
    ConsulClient,
    KvRow,
    TxnConflictError,
    cas,
    check_session,
    delete_cas,
    put,
)
from nomad_watchdog.clock import steps
from nomad_watchdog.errors import DeniedError, NoRegistryError, TerminalError, UserError
from nomad_watchdog.ids import Slug, shard_of
from nomad_watchdog.model import DeviceRecord
from nomad_watchdog.registry import CommitGuard, RegistryDocument, RegistrySnapshot, check_document
from nomad_watchdog.registry.codec import Decoder, PoisonError, decode, encode

_TXN_OPS: Final = 64
"""Consul takes 128 (_TXN_MOST), and at 64 one transaction still leaves room for others on the leader."""
_TXN_MOST: Final = 128
_TXN_BYTES: Final = 380_000
"""Consul takes 524,288 bytes of JSON; this counts values as base64 and leaves room for the keys."""
_BUCKETS: Final = 256
_WAIT_S: Final = 5.0
"""Of one blocking query, which transfers only the names of the buckets. A snapshot that is restored between
two queries is noticed when the second ends."""
_MIN_GAP_S: Final = 0.25
_GAP_PER_COST: Final = 5.0
"""A watch returns the whole prefix each time: at most a sixth of the time goes into reading it."""


class ConsulRegistry:
    """A store of device records in Consul. The caller closes the client."""

    def __init__(self, *, client: ConsulClient, prefix: str = "nomad-watchdog") -> None:
        if not prefix.strip("/") or not prefix.isprintable() or prefix.startswith("/"):
            raise UserError(
                f"registry prefix {prefix!r} is not allowed; use one such as nomad-watchdog"
            )
        self._client = client
        root = prefix.strip("/")
        self._sentinel = f"{root}/meta"
        self._folder = f"{root}/devices/"
        self._documents = f"{root}/documents/"
        self._inner_sentinel = f"{root}/devices/meta"
        self._decoder = Decoder()

    @property
    def poisoned(self) -> Mapping[str, str]:
        return self._decoder.poisoned

    async def initialise(self, installation: str = "") -> str:
        body = json.dumps({"v": 1, "installation": installation or str(uuid.uuid4())}).encode()
        try:
            await self._client.txn(
                [cas(self._sentinel, body, 0), cas(self._inner_sentinel, body, 0)]
            )
        except TxnConflictError as error:
            if error.lost == {0, 1}:
                return await self.installation()
            # one of the two sentinels was deleted manually
            raise TerminalError(
                f"only one of the Consul keys {self._sentinel} and {self._inner_sentinel} exists; "
                "restore the store from a snapshot, or delete that key if the store is new"
            ) from error
        return await self.installation()

    async def installation(self) -> str:
        row = await self._client.kv_get(self._sentinel)
        if row is None:
            raise NoRegistryError(
                f"Consul has no key {self._sentinel}: this is another cluster, or its store was "
                "wiped; bring lost records back with `nomad-watchdog registry import FILE`; only for a new "
                "installation run `nomad-watchdog init`"
            )
        return _installation(row)

    async def read(self) -> RegistrySnapshot:
        index, rows = await self._client.kv_tree(self._folder)
        return await self._snapshot(index, rows)

    async def get(self, slug: Slug) -> DeviceRecord | None:
        key = self._key(slug)
        row = await self._client.kv_get(key)
        if row is None:
            await self.installation()
            return None
        try:
            return decode(row.value, slug=slug, index=row.index)
        except PoisonError as error:
            raise TerminalError(f"the record at {key} can't be used: {error}") from error

    async def commit(
        self, records: Sequence[DeviceRecord], guards: Sequence[CommitGuard] = ()
    ) -> Sequence[DeviceRecord | None]:
        bodies = [encode(record) async for some in steps(records) for record in some]
        # an existing index proves that this is the store it came from; a first write does not
        if any(record.index == 0 for record in records):
            await self.installation()
        checks = [check_session(guard.key, guard.session) for guard in guards]
        stored: list[DeviceRecord | None] = [None] * len(records)
        for chunk in _chunks(bodies, _TXN_MOST - len(checks)):
            done = await self._commit_chunk(chunk, records, bodies, checks)
            for position, index in done.items():
                stored[position] = replace(records[position], index=index)
        return stored

    async def forget(self, records: Sequence[DeviceRecord]) -> Sequence[bool]:
        gone = [False] * len(records)
        most = _TXN_OPS - 1
        for first in range(0, len(records), most):
            left = list(range(first, min(first + most, len(records))))
            while left:
                keys = [(self._key(records[i].slug), records[i].index) for i in left]
                # A quarter of an hour after a deletion Consul forgets its index, and that of the folder would go
                # back. A key that stays takes it over; Consul skips a write that changes nothing.
                mark = json.dumps({"v": 1, "forgot": str(uuid.uuid4())}).encode()
                deletions = [delete_cas(key, index) for key, index in keys]
                try:
                    await self._client.txn([*deletions, put(self._inner_sentinel, mark)])
                except TxnConflictError as error:
                    if not error.lost:
                        raise
                    left = [i for at, i in enumerate(left) if at not in error.lost]
                    continue
                for i in left:
                    gone[i] = True
                break
        return gone

    async def watch(self, index: int) -> AsyncIterator[RegistrySnapshot]:
        known, rested_at = index, 0.0
        while True:  # first a plain read: Consul would sleep on an index from the future
            await asyncio.sleep(max(0.0, rested_at - time.monotonic()))
            found, rows = await self._client.kv_tree(self._folder)
            started = time.monotonic()
            if found < known:
                self._decoder.forget()  # another history: equal indexes mean nothing
            snapshot = await self._snapshot(found, rows)
            if found != known:
                known = found
                yield snapshot
            done = time.monotonic()
            rested_at = done + max(_MIN_GAP_S, _GAP_PER_COST * (done - started))
            await self._changed(known)

    async def _changed(self, index: int) -> None:
        """Wait until the records have another index than this one."""
        sentinel, found = self._inner_sentinel, index
        while found == index:
            found = await self._client.kv_change(self._folder, index, _WAIT_S, beacon=sentinel)
            await asyncio.sleep(_MIN_GAP_S if found == index else 0.0)

    async def document(self, name: str) -> RegistryDocument:
        check_document(name)
        row = await self._client.kv_get(self._documents + name)
        if row is None:
            await self.installation()  # there is none, or the token may not read it
            return RegistryDocument()
        return RegistryDocument(row.value, row.index)

    async def commit_document(
        self, name: str, document: RegistryDocument
    ) -> RegistryDocument | None:
        check_document(name, document.body)
        if document.index == 0:
            await self.installation()
        operation = cas(self._documents + name, document.body, document.index)
        try:
            (row,) = await self._client.txn([operation])
        except TxnConflictError as error:
            if not error.lost:
                raise
            return None
        return replace(document, index=row.index)

    async def check_writable(self) -> None:
        await self._client.check_writable(self._documents + "write-check")

    async def close(self) -> None:
        """Nothing to close: the caller closes the client."""

    def _key(self, slug: Slug) -> str:
        return f"{self._folder}{shard_of(slug, _BUCKETS):02x}/{slug}"

    async def _snapshot(self, index: int, rows: list[KvRow]) -> RegistrySnapshot:
        if not any(row.key == self._inner_sentinel for row in rows):
            await self.installation()  # raises when there is none, or when it is denied
            raise DeniedError(
                f"Consul shows {self._sentinel} but not {self._inner_sentinel}: the token needs "
                f'key_prefix "{self._folder}" {{ policy = "read" }}, or the records were deleted'
            )
        devices = (row for row in rows if row.key != self._inner_sentinel)
        records = self._decoder.decode(
            (row.key, self._slug_of_key(row.key), row.index, row.value) for row in devices
        )
        return RegistrySnapshot(records, index, self._decoder.unreadable)

    def _slug_of_key(self, key: str) -> str:
        """The slug when the key is where we would have put it; else what no record can match."""
        slug = Slug(key.rpartition("/")[2])
        return slug if self._key(slug) == key else ""

    async def _commit_chunk(
        self,
        chunk: range,
        records: Sequence[DeviceRecord],
        bodies: Sequence[bytes],
        checks: Sequence[Mapping[str, object]],
    ) -> dict[int, int]:
        """New index by position, for those whose compare-and-set won.

        A transaction writes all or nothing, so the losers, which Consul names, are left out and the
        rest is tried again; each round has fewer, so it ends.
        """
        left = list(chunk)
        while left:
            writes = [cas(self._key(records[i].slug), bodies[i], records[i].index) for i in left]
            try:
                rows = await self._client.txn([*checks, *writes])
            except TxnConflictError as error:
                if not error.lost:
                    raise
                first = len(checks)
                left = [position for at, position in enumerate(left, first) if at not in error.lost]
                continue
            news = rows[len(checks) :]
            return {position: row.index for position, row in zip(left, news, strict=True)}
        return {}


def _chunks(bodies: Sequence[bytes], most: int) -> Iterator[range]:
    """Ranges of at most `most` positions that fit one transaction."""
    most = max(1, min(most, _TXN_OPS))
    first, size = 0, 0
    for position, body in enumerate(bodies):
        weight = len(body) * 4 // 3 + 300
        if position > first and (position - first == most or size + weight > _TXN_BYTES):
            yield range(first, position)
            first, size = position, 0
        size += weight
    if first < len(bodies):
        yield range(first, len(bodies))


def _installation(row: KvRow) -> str:
    try:
        document = loads(row.value)
        return str(uuid.UUID(document["installation"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the Consul key {row.key} has no installation ID: it belongs to another program, or it was changed "
            "manually; choose another prefix or restore it"
        ) from error
