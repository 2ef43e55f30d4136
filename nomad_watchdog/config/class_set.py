"""A set of class specs as the registry keeps it: the one that is in force for the whole fleet.

The document `classes` says which set that is, and since when. The specs are in it, compressed, or in documents of
their own, named by their content, when they take too much. Whole specs are kept, with the texts of their templates,
so that a replica that lacks a file can follow.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from nomad_watchdog.core.config_precedence import ConfigStanding
from nomad_watchdog.core.settings_diff import words
from nomad_watchdog.errors import StaleError
from nomad_watchdog.model import AgentSpec, Variant
from nomad_watchdog.registry import Registry, RegistryDocument, read_document

NAME: Final = "classes"
VERSION: Final = 1
_PART: Final = 60_000
"""Bytes of the specs in one document, so that it stays below `MAX_DOCUMENT`."""
_INLINE: Final = 40_000
"""Bytes up to which they are in the document itself, before they are written as text."""
_MEND: Final = "delete it: the next replica that starts writes it anew"

Specs = Mapping[str, AgentSpec]


@dataclass(frozen=True, slots=True)
class InForce:
    """What is in force."""

    standing: ConfigStanding
    specs: Specs
    """By class."""
    by: str
    """The replica that brought it into force."""
    since: float
    """Wall time of that, by that replica's clock."""
    parts: tuple[str, ...] = field(default=(), compare=False)
    """Names of the documents that hold the specs; none = they are in the document itself."""


def digest(specs: Specs) -> str:
    """Of what agents of these classes do, on every scheduler: equal for replicas that are configured equally, on
    whatever paths their files are and wherever they are reached."""
    said = {name: _behaviour(spec) for name, spec in specs.items()}
    return hashlib.sha256(_text(said)).hexdigest()[:12]


def _behaviour(spec: AgentSpec) -> list[object]:
    on = {
        backend: [one.text or one.template, dict(one.variables)] for backend, one in spec.on.items()
    }
    return [spec.spec_hash, on]


def differences(before: Specs, after: Specs) -> list[str]:
    """The classes that are not the same in both, by name, with the change in words where it is known."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            found.append(f"{name} ({'added' if old is None else 'removed'})")
        elif _behaviour(old) != _behaviour(new):
            said = words(old.settings, new.settings)
            found.append(f"{name} ({said})" if said else name)
    return found


async def read(registry: Registry, known: RegistryDocument, kept: InForce | None) -> ClassSetRead:
    """What is in force now. `known`, `kept`: the last reading, which is not decoded again. Raises as the registry,
    UserError when it can't be understood, and StaleError while it is being written."""
    document = await registry.document(NAME)
    if document.index == known.index and document.body == known.body:
        return ClassSetRead(known, kept)
    if not document.body:
        return ClassSetRead(document, None)
    head = read_document(NAME, document.body, VERSION, _Head.read, _MEND)
    body = head.body
    if head.parts:
        body = b"".join([(await registry.document(name)).body for name in head.parts])
    if _sum(body) != head.sum:
        raise StaleError("the specs in force are just being changed; they are read again soon")
    specs = read_document(NAME, zlib.decompress(body), VERSION, _specs, _MEND)
    return ClassSetRead(document, InForce(head.standing, specs, head.by, head.since, head.parts))


@dataclass(frozen=True, slots=True)
class ClassSetRead:
    """The document as it was read, and what it says; None = no set was ever in force."""

    document: RegistryDocument = field(default_factory=RegistryDocument)
    kept: InForce | None = None


async def write(registry: Registry, before: ClassSetRead, wanted: InForce) -> ClassSetRead | None:
    """Bring a set into force in place of `before`; None where another replica was faster. Raises as the registry,
    and UserError when it is too large."""
    body = zlib.compress(_text({"v": VERSION, "specs": _encoded(wanted.specs)}), 9)
    names: tuple[str, ...] = ()
    if len(body) > _INLINE:
        pieces = [body[at : at + _PART] for at in range(0, len(body), _PART)]
        names = tuple(f"{NAME}-{_sum(body)[:12]}-{number}" for number in range(len(pieces)))
        for name, piece in zip(names, pieces, strict=True):
            await _put(registry, name, piece)
    head = {
        "v": VERSION,
        "number": wanted.standing.number,
        "digest": wanted.standing.digest,
        "superseded": list(wanted.standing.superseded),
        "by": wanted.by,
        "since": wanted.since,
        "sum": _sum(body),
        "parts": list(names),
        "body": "" if names else base64.b64encode(body).decode(),
    }
    stored = await registry.commit_document(NAME, replace(before.document, body=_text(head)))
    if stored is None:
        return None
    for name in before.kept.parts if before.kept else ():
        if name not in names:
            await _put(registry, name, b"")
    return ClassSetRead(stored, replace(wanted, parts=names))


async def _put(registry: Registry, name: str, body: bytes) -> None:
    """Whoever writes this name at the same time writes the same, but for one that clears it, which a reader sees by
    the sum."""
    found = await registry.document(name)
    if found.body != body:
        await registry.commit_document(name, replace(found, body=body))


@dataclass(frozen=True, slots=True)
class _Head:
    standing: ConfigStanding
    by: str
    since: float
    sum: str
    parts: tuple[str, ...]
    body: bytes

    @classmethod
    def read(cls, said: Any) -> _Head:
        superseded = tuple(map(str, said["superseded"]))
        return cls(
            ConfigStanding(int(said["number"]), str(said["digest"]), superseded),
            str(said["by"]),
            float(said["since"]),
            str(said["sum"]),
            tuple(map(str, said["parts"])),
            base64.b64decode(said["body"]),
        )


def _encoded(specs: Specs) -> dict[str, Any]:
    return {name: asdict(spec) for name, spec in specs.items()}


def _specs(said: Any) -> dict[str, AgentSpec]:
    """What a later version of this program says besides is left out."""
    found = {}
    for name, one in said["specs"].items():
        on = {backend: Variant(**_known(Variant, part)) for backend, part in one["on"].items()}
        found[str(name)] = AgentSpec(**{**_known(AgentSpec, one), "on": on})
    return found


def _known(kind: type[AgentSpec | Variant], said: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: said[one.name] for one in fields(kind) if one.name in said}


def _sum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _text(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def in_words(classes: Iterable[str]) -> str:
    """Some classes, for one line of text."""
    some = list(classes)
    more = f" and {len(some) - 5} more" if len(some) > 5 else ""
    return f"{', '.join(some[:5])}{more}"
