"""Which settings each spec hash stands for, so that a change of a class can be stated in words.

An agent carries only the hash of the spec that it was started with. What that spec was is kept in a small
document per class in the registry: the last MAX_KEPT specs that were in force.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from nomad_watchdog.core.settings_diff import words
from nomad_watchdog.errors import UserError, WatchdogError
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.registry import MAX_DOCUMENT, Registry, read_document

log = logging.getLogger(__name__)

MAX_KEPT: Final = 4
VERSION: Final = 1
TRIES: Final = 3
"""Rounds of compare-and-set that other replicas may win; they write the same."""

Settings = Mapping[str, str]


class SpecHistory:
    """The settings of the specs that are or were in force, by class and hash."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: dict[str, dict[str, Settings]] = {}

    def change(self, agent_class: str, spec_hash: str, spec: AgentSpec | None) -> str:
        """What `spec` changes for an agent of another hash, in words; "" when that is not known."""
        if "/" in spec_hash:  # see `schedulers.nomad._view`
            return "its job was made of two versions at once"
        before = self._known.get(agent_class, {}).get(spec_hash)
        return "" if before is None or spec is None else words(before, spec.settings)

    async def read(self, classes: Iterable[str]) -> None:
        """Read what is kept of these classes. What can't be read is logged: a change without its words
        is rolled out all the same."""
        for name in classes:
            try:
                found = await self._registry.document(_document(name))
                self._known[name] = self._known.get(name, {}) | _decoded(name, found.body)
            except WatchdogError as error:
                log.warning("spec history not read", extra={"reason": str(error)})

    async def remember(self, specs: Iterable[AgentSpec]) -> None:
        """Keep the settings of specs that are in force now; one that is kept already costs nothing."""
        for spec in specs:
            known = self._known.setdefault(spec.agent_class, {})
            if spec.spec_hash in known or not spec.settings:
                continue
            try:
                await self._store(spec)
                known[spec.spec_hash] = spec.settings
            except WatchdogError as error:
                log.warning("spec history not kept", extra={"reason": str(error)})

    async def _store(self, spec: AgentSpec) -> None:
        name = _document(spec.agent_class)
        for _ in range(TRIES):
            found = await self._registry.document(name)
            kept = _decoded(spec.agent_class, found.body)
            self._known[spec.agent_class].update(kept)
            if spec.spec_hash in kept:
                return
            wanted = replace(found, body=_encoded({**kept, spec.spec_hash: spec.settings}))
            if await self._registry.commit_document(name, wanted) is not None:
                return


def _document(agent_class: str) -> str:
    return f"specs-{hashlib.sha256(agent_class.encode()).hexdigest()[:16]}"


def _encoded(kept: dict[str, Settings]) -> bytes:
    """The newest of them, as many as fit."""
    newest = list(kept.items())[-MAX_KEPT:]
    while True:
        body = json.dumps({"v": VERSION, "specs": [[h, dict(s)] for h, s in newest]}).encode()
        if len(body) <= MAX_DOCUMENT or not newest:
            return body
        newest = newest[1:]


def _decoded(agent_class: str, body: bytes) -> dict[str, Settings]:
    if not body:
        return {}
    try:
        return read_document(_document(agent_class), body, VERSION, _specs, "delete it")
    except UserError as error:
        log.warning("spec history can't be used", extra={"reason": str(error)})
        return {}


def _specs(said: Any) -> dict[str, Settings]:
    return {
        str(spec_hash): {str(name): str(value) for name, value in settings.items()}
        for spec_hash, settings in said["specs"]
    }
