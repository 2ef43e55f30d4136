"""The set of class specs that is in force for the whole fleet, as stored in the registry.

The document `classes` records which set is in force, and since when. It contains the compressed specs; if they are
too large, they are stored in separate documents that are named by their content. Specs are stored whole, with the
text of their templates, so that a replica without a template file can follow.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator

from nomad_watchdog.core.config_precedence import ConfigStanding
from nomad_watchdog.core.settings_diff import words
from nomad_watchdog.errors import DamagedError, StaleError
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.registry import Registry
from nomad_watchdog.registry.document import Document, DocumentFormat
from nomad_watchdog.schedulers.agent_document import spec_fields, stored_spec

_PART: Final = 60_000
"""Maximum size of the specs in one document, in bytes, so that it stays below `MAX_DOCUMENT`."""
_INLINE: Final = 40_000
"""Maximum size of the compressed specs in the document itself, in bytes before base64."""
_REPAIR: Final = "delete it: the next replica that starts writes it again"

Specs = Mapping[str, AgentSpec]


@dataclass(frozen=True, slots=True)
class InForce:
    """The set of class specs in force."""

    standing: ConfigStanding
    specs: Specs
    """By class."""
    by: str
    """The replica that put it in force."""
    since: float
    """Wall time when it came into force, by that replica's clock."""


def digest(specs: Specs) -> str:
    """Digest of the behaviour of these classes on every scheduler. It is equal for replicas with the same
    configuration, whatever the paths of their files and the addresses of their APIs."""
    said = {name: _behaviour(spec) for name, spec in specs.items()}
    return hashlib.sha256(_text(said)).hexdigest()[:12]


def _behaviour(spec: AgentSpec) -> list[object]:
    on = {
        backend: [one.text or one.template, dict(one.variables)] for backend, one in spec.on.items()
    }
    return [spec.spec_hash, on]


def differences(before: Specs, after: Specs) -> list[str]:
    """The classes that differ, by name, each with a description of the change if it is known."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            found.append(f"{name} ({'added' if old is None else 'removed'})")
        elif _behaviour(old) != _behaviour(new):
            said = words(old.settings, new.settings)
            found.append(f"{name} ({said})" if said else name)
    return found


class _HeadFields(BaseModel):
    number: int
    digest: str
    superseded: tuple[str, ...]
    by: str
    since: float
    sum: str
    """Checksum of the compressed specs, to detect parts that were read during a write."""
    parts: tuple[str, ...]
    """Names of the documents that contain the compressed specs; empty = they are in `body`."""
    body: str
    """Base64."""


class _SpecsFields(BaseModel):
    """Fields from a later version of this program are ignored."""

    specs: dict[str, Annotated[AgentSpec, BeforeValidator(spec_fields)]]


HEAD: Final[DocumentFormat[_HeadFields | None]] = DocumentFormat(
    name="classes",
    empty=None,
    parse=_HeadFields.model_validate,
    serialize=lambda head: {} if head is None else head.model_dump(mode="json"),
    repair=_REPAIR,
)
_SPECS: Final[DocumentFormat[Specs]] = DocumentFormat(
    name="classes",
    empty={},
    parse=lambda fields: _SpecsFields.model_validate(fields).specs,
    serialize=lambda specs: {"specs": {name: stored_spec(spec) for name, spec in specs.items()}},
    repair=_REPAIR,
)


class ClassSetStore:
    """The set in force, as one replica last read it."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._document = Document(registry, HEAD)
        self._read: _HeadFields | None = None
        self._lock = asyncio.Lock()
        self.in_force: InForce | None = None
        """None = no set was ever in force, or none was read yet."""

    async def read(self) -> InForce | None:
        """Read the set in force. Raises the errors of `Document.refresh`, and StaleError during a write."""
        async with self._lock:
            return await self._refresh()

    async def _refresh(self) -> InForce | None:
        await self._document.refresh()
        head = self._document.value
        if head is self._read:
            return self.in_force
        self.in_force, self._read = None if head is None else await self._decoded(head), head
        return self.in_force

    async def _decoded(self, head: _HeadFields) -> InForce:
        parts = [(await self._registry.document(name)).body for name in head.parts]
        try:
            body = b"".join(parts) if parts else base64.b64decode(head.body)
            if _sum(body) != head.sum:
                raise StaleError("the specs in force are being changed; they are read again soon")
            specs = _SPECS.decode(zlib.decompress(body))
        except (ValueError, zlib.error) as error:
            raise DamagedError(
                f"the registry's document {HEAD.name} can't be used; {_REPAIR}"
            ) from error
        standing = ConfigStanding(head.number, head.digest, head.superseded)
        return InForce(standing, specs, head.by, head.since)

    async def write(self, wanted: InForce, instead_of: InForce | None) -> bool:
        """Put a set in force in place of `instead_of`; False if that is no longer in force. Raises the errors of
        `Document.replace`, and UserError if the set is too large."""
        async with self._lock:
            return self.in_force is instead_of and await self._write(wanted)

    async def _write(self, wanted: InForce) -> bool:
        before = self._document.value
        body = zlib.compress(_SPECS.encode(wanted.specs), 9)
        parts: tuple[str, ...] = ()
        if len(body) > _INLINE:
            pieces = [body[at : at + _PART] for at in range(0, len(body), _PART)]
            parts = tuple(
                f"{HEAD.name}-{_sum(body)[:12]}-{number}" for number in range(len(pieces))
            )
            for name, piece in zip(parts, pieces, strict=True):
                await self._put(name, piece)
        head = _HeadFields(
            number=wanted.standing.number,
            digest=wanted.standing.digest,
            superseded=wanted.standing.superseded,
            by=wanted.by,
            since=wanted.since,
            sum=_sum(body),
            parts=parts,
            body="" if parts else base64.b64encode(body).decode(),
        )
        if not await self._document.replace(head):
            return False
        self._read, self.in_force = head, wanted
        for name in before.parts if before else ():
            if name not in parts:
                await self._put(name, b"")
        return True

    async def _put(self, name: str, body: bytes) -> None:
        """Write one part. Replicas that write this document at the same time write the same body, except one that
        clears it; readers detect that by the checksum."""
        found = await self._registry.document(name)
        if found.body != body:
            await self._registry.commit_document(name, replace(found, body=body))


def _sum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def in_words(classes: Iterable[str]) -> str:
    """The first five classes and the number of others, as one line of text."""
    some = list(classes)
    more = f" and {len(some) - 5} more" if len(some) > 5 else ""
    return f"{', '.join(some[:5])}{more}"
