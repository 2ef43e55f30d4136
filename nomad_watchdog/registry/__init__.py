"""The durable records of devices: the interface of the stores.

Every write is a compare-and-set of whole records, decided by pure functions (`core.presence`); the store does not
interpret them. Heartbeats and reports are never written here.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """All records, absent ones (tombstones) included, as of one index of the store."""

    records: Mapping[Slug, DeviceRecord]
    index: int
    unreadable: frozenset[Slug] = frozenset()
    """Devices whose record can't be decoded: no action is taken for them."""


@dataclass(frozen=True, slots=True)
class CommitGuard:
    """A lock in the store that must still be held for a commit to happen (S2)."""

    key: str
    session: str = field(repr=False)


MAX_DOCUMENT: Final = 64 * 1024
"""Maximum size of one document, bytes."""
_DOCUMENT_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class RegistryDocument:
    """A body that the store does not interpret, and its compare-and-set token."""

    body: bytes = b""
    index: int = 0


def check_document(name: str, body: bytes = b"") -> None:
    """Raises UserError for a name or size that stores reject."""
    if _DOCUMENT_NAME.fullmatch(name) is None:
        raise UserError(f"document name {name!a} must be a-z, 0-9 and '-', at most 32 characters")
    if len(body) > MAX_DOCUMENT:
        raise UserError(
            f"document {name} has {len(body)} bytes; at most {MAX_DOCUMENT} are allowed"
        )


class Registry(Protocol):
    """A store of device records.

    Every method raises TransientError when the store can't be reached in time, TerminalError or
    DeniedError when it refuses for good, and UserError when the store was never initialised: the
    sentinel is missing, so this is the wrong store or a wiped one, and nothing may be decided on it.
    """

    async def initialise(self, installation: str = "") -> str:
        """Write the sentinel unless it is there; return the installation's id.

        `installation`: the id to write, of a registry that is restored from a backup; "" = a new random
        UUID. A sentinel that is there stays, whatever its id."""
        ...

    async def installation(self) -> str:
        """The installation's id from the sentinel; UserError when there is none."""
        ...

    async def read(self) -> RegistrySnapshot:
        """All records, read consistently. A record that can't be decoded is left out, named in `poisoned` and
        logged; it does not affect the others (S9)."""
        ...

    async def get(self, slug: Slug) -> DeviceRecord | None:
        """One record as the store has it now, or None."""
        ...

    async def commit(
        self, records: Sequence[DeviceRecord], guards: Sequence[CommitGuard] = ()
    ) -> Sequence[DeviceRecord | None]:
        """Store each record if the stored index is still `record.index` (0 = it must not exist), and if
        all `guards` are still held (FencedError: one is not, and then nothing of its part is written).

        Returns, in order, the record with its new index, or None where the compare-and-set lost.
        Durable when it returns (S4). Items are independent: one conflict does not undo the others.
        A TransientError means that any part may or may not have been written: read again.
        """
        ...

    async def forget(self, records: Sequence[DeviceRecord]) -> Sequence[bool]:
        """Delete each record if the stored index is still `record.index`; in order, whether it is gone. One that did
        not exist counts as gone.
        Only for tombstones below the floor (`core.tombstones`). Durable, and fails, as `commit`."""
        ...

    def watch(self, index: int) -> AsyncIterator[RegistrySnapshot]:
        """A snapshot each time that something changed past `index`, coalesced; unchanged records are
        the same objects from one snapshot to the next. An index that went backwards gives a full
        snapshot (start over). Never ends; raises as the other methods."""
        ...

    async def document(self, name: str) -> RegistryDocument:
        """A small document beside the records, such as the pauses, as the store has it now; one that was
        never written has no body and index 0. `name`: [a-z][a-z0-9-]*, at most 32 characters."""
        ...

    async def commit_document(
        self, name: str, document: RegistryDocument
    ) -> RegistryDocument | None:
        """Store the body if the stored index is still `document.index` (0 = it must not exist).

        Returns it with its new index, or None where the compare-and-set lost. Durable when it returns
        (S4). Raises UserError when the body is larger than MAX_DOCUMENT bytes. `watch` need not return when only
        a document changes."""
        ...

    async def check_writable(self) -> None:
        """Raise what a write would raise that is refused whatever it contains. Writes nothing: Consul adds no entry
        to its log."""
        ...

    async def close(self) -> None: ...

    @property
    def poisoned(self) -> Mapping[str, str]:
        """Store key → what is wrong, for records left out of the last snapshot."""
        ...


COMMIT_TRIES: Final = 5
"""Maximum number of compare-and-sets in a row that may lose before the caller gets a ConflictError."""
