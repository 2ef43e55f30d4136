"""Which settings each spec hash stands for, so that a change of a class can be described.

An agent carries only the hash of the spec that it was started with. The registry has a small document per class with
the last MAX_KEPT specs that were in force.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final

from pydantic import BaseModel

from nomad_watchdog.core.settings_diff import words
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.registry import MAX_DOCUMENT, Registry
from nomad_watchdog.registry.document import Document, DocumentFormat

log = logging.getLogger(__name__)

MAX_KEPT: Final = 4
_MAX_BYTES: Final = MAX_DOCUMENT - 1_000
"""Maximum size of the specs as JSON, in bytes; the rest is for the fields around them."""

Settings = Mapping[str, str]
History = Mapping[str, Settings]
"""Hash of a spec → its settings, the newest last."""


class SpecHistory:
    """The settings of the specs that are or were in force, by class and hash."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: dict[str, History] = {}

    def change(self, agent_class: str, spec_hash: str, spec: AgentSpec | None) -> str:
        """The changes from the spec with `spec_hash` to `spec`, in words; "" = unknown."""
        if "/" in spec_hash:  # see `schedulers.nomad._view`
            return "its job was made of two versions at once"
        before = self._known.get(agent_class, {}).get(spec_hash)
        return "" if before is None or spec is None else words(before, spec.settings)

    async def read(self, classes: Iterable[str]) -> None:
        """Read the stored specs of these classes. A failure is only logged, because roll-outs do not depend on them."""
        for name in classes:
            document = self._document(name)
            try:
                await document.refresh()
                self._known[name] = _merged(document.value, self._known.get(name, {}))
            except WatchdogError as error:
                log.warning("spec history not read", extra={"reason": str(error)})

    async def remember(self, specs: Iterable[AgentSpec]) -> None:
        """Store the settings of the specs in force. Skips those already stored."""
        for spec in specs:
            name, added = spec.agent_class, {spec.spec_hash: spec.settings}
            known = self._known.get(name, {})
            if spec.spec_hash in known or not spec.settings:
                continue
            document = self._document(name)
            try:
                await document.update(partial(_merged, added))
                self._known[name] = _merged(document.value, known)
            except WatchdogError as error:
                log.warning("spec history not stored", extra={"reason": str(error)})

    def _document(self, agent_class: str) -> Document[History]:
        name = f"specs-{hashlib.sha256(agent_class.encode()).hexdigest()[:16]}"
        return Document(
            self._registry,
            DocumentFormat(name, {}, _parsed, _serialized, "delete it", replaceable=True),
        )


def _merged(newer: History, older: History) -> History:
    return {**older, **newer}


class _HistoryFields(BaseModel):
    specs: list[tuple[str, dict[str, str]]]


def _parsed(fields: object) -> History:
    return dict(_HistoryFields.model_validate(fields).specs)


def _serialized(history: History) -> dict[str, object]:
    """The newest specs, as many as fit."""
    newest = list(history.items())[-MAX_KEPT:]
    while newest and len(json.dumps(newest)) > _MAX_BYTES:
        newest = newest[1:]
    return {"specs": newest}
