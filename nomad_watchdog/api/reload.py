"""The configuration of the running service: read it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload did. Each entry is a setting with its values before and after."""

    changed: tuple[str, ...] = ()
    """In force now."""
    needs_restart: tuple[str, ...] = ()
    """In the configuration, and in force after a restart of the service."""
    unprepared: Mapping[str, str] = field(default_factory=dict)
    """Agent class → why it can't be prepared: its devices keep their agents and get none."""

    def __str__(self) -> str:
        changed = f"changed: {', '.join(self.changed)}" if self.changed else "nothing changed"
        rest = f"; needs a restart: {', '.join(self.needs_restart)}" if self.needs_restart else ""
        bad = f"; classes that can't be prepared: {', '.join(sorted(self.unprepared))}"
        return changed + rest + (bad if self.unprepared else "")


class Reloads(Protocol):
    """Reads the configuration again."""

    async def reload(self) -> Reloaded:
        """Raises UserError or TerminalError when it is not valid; then nothing has changed."""
        ...


async def reload(request: web.Request) -> web.StreamResponse:
    """As SIGHUP, and the answer says what changed. Raises UserError (400) that names what is wrong with the
    configuration."""
    reloads = request.app[CONTEXT].reloads
    if reloads is None:
        raise NotFoundError("this server has no configuration to read again")
    done = await reloads.reload()
    audit(request, "reload", "reloaded")
    return json_response(
        {
            "changed": list(done.changed),
            "needs_restart": list(done.needs_restart),
            "unprepared_classes": dict(done.unprepared),
        }
    )
