"""A small JSON document in the registry that several replicas read, and change by compare-and-set."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.errors import ConflictError, DamagedError, UserError
from nomad_watchdog.registry import COMMIT_TRIES, Registry, RegistryDocument

log = logging.getLogger(__name__)

T = TypeVar("T")
_RETRY_S: Final = 0.05
"""Maximum wait after the first lost compare-and-set, seconds; it doubles with each further one."""


class OtherVersionError(UserError):
    """Another version of this program wrote the document."""


@dataclass(frozen=True, slots=True)
class DocumentFormat(Generic[T]):
    """How a value of type T is stored as a document."""

    name: str
    empty: T
    """The value of a document that was never written."""
    parse: Callable[[object], T]
    """Makes the value of the JSON object. Raises ValueError, KeyError or TypeError for an invalid one."""
    serialize: Callable[[T], Mapping[str, object]]
    repair: str
    """What the user should do about a damaged document."""
    version: int = 1
    replaceable: bool = False
    """A document that cannot be read counts as empty, and the next change overwrites it."""

    def decode(self, body: bytes) -> T:
        """The value in the body of a document.

        Raises OtherVersionError, and DamagedError for anything that `encode` does not write."""
        if not body:
            return self.empty
        try:
            return self._parse(body)
        except (DamagedError, OtherVersionError) as error:
            if not self.replaceable:
                raise
            log.warning("document ignored", extra={"reason": str(error)})
            return self.empty

    def _parse(self, body: bytes) -> T:
        try:
            fields = loads(body)
            version = fields["v"]
            if not isinstance(version, int):
                raise TypeError  # noqa: TRY301  # damaged, not another version
            if version != self.version:
                raise OtherVersionError(
                    f"the registry's document {self.name} is of version {version}; this program reads {self.version}"
                )
            return self.parse(fields)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"the registry's document {self.name} can't be used; {self.repair}"
            ) from error

    def encode(self, value: T) -> bytes:
        """The body that stores this value."""
        fields = {"v": self.version, **self.serialize(value)}
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


class Document(Generic[T]):
    """One replica's copy of a document. All methods raise what the registry raises, and what
    `DocumentFormat.decode` raises."""

    def __init__(self, registry: Registry, layout: DocumentFormat[T]) -> None:
        self.value = layout.empty
        """As last read or written here; a document that cannot be read leaves it as it is."""
        self._registry = registry
        self._format = layout
        self._stored = RegistryDocument(index=-1)
        self._is_readable = False

    @property
    def index(self) -> int:
        """The registry's index of the document that was last read; -1 = not read yet, 0 = never written."""
        return self._stored.index

    async def refresh(self) -> bool:
        """Read the document; whether it is another one than the last time."""
        return self._apply(await self._registry.document(self._format.name))

    async def update(self, change: Callable[[T], T]) -> bool:
        """Store what `change` makes of the stored value; whether that is a different value.

        Durable when it returns. Raises ConflictError when other writers won COMMIT_TRIES times in a row."""
        for attempt in range(COMMIT_TRIES):
            if attempt:
                await asyncio.sleep(random.uniform(0.0, _RETRY_S * 2**attempt))  # noqa: S311  # jitter
            found = await self._registry.document(self._format.name)
            before = self._format.decode(found.body)
            after = change(before)
            if after == before:
                self._apply(found)
                return False
            if await self._store(found, after):
                return True
        raise ConflictError(
            f"the registry's document {self._format.name} is being changed by others; try again"
        )

    async def replace(self, value: T) -> bool:
        """Store this value if the document is still as it was last read; whether it was."""
        return await self._store(self._stored, value)

    async def _store(self, before: RegistryDocument, value: T) -> bool:
        wanted = RegistryDocument(self._format.encode(value), max(before.index, 0))
        stored = await self._registry.commit_document(self._format.name, wanted)
        if stored is not None:
            self._stored, self.value, self._is_readable = stored, value, True
        return stored is not None

    def _apply(self, found: RegistryDocument) -> bool:
        if found == self._stored and self._is_readable:
            return False
        self._stored, self._is_readable = found, False
        self.value = self._format.decode(found.body)
        self._is_readable = True
        return True
