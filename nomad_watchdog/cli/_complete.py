"""What a shell completes: IDs, classes, verdicts and kinds of events. On any error: nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import click

TIMEOUT_S: Final = 2.0
"""Someone waits at a prompt."""
MAX_SHOWN: Final = 100
KINDS: Final = (
    "absent", "agent", "audit", "classes", "condition", "config", "conflict", "error", "flapping", "incident", "inventory",
    "migration", "node", "paused", "plan", "pool", "present", "rebalance", "refused", "registry", "relief", "repair", "replica",
    "resumed", "rollout", "shards", "steady", "verdict",
)  # fmt: skip
"""The first parts of the kinds of events."""

_Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def devices(ctx: click.Context, _param: click.Parameter, start: str) -> list[str]:
    """IDs of devices that begin with what was typed. They are listed in their order, from there on."""
    return _from_api(ctx, start, "/v1/devices", "id", cursor=_before(start), limit=MAX_SHOWN)


def agent_classes(ctx: click.Context, _param: click.Parameter, start: str) -> list[str]:
    """Names of the agent classes in force."""
    return _from_api(ctx, start, "/v1/rollouts", "class")


def pools(ctx: click.Context, _param: click.Parameter, start: str) -> list[str]:
    """Names of pools."""
    return _from_api(ctx, start, "/v1/pools", "name")


def verdicts(_ctx: click.Context, _param: click.Parameter, start: str) -> list[str]:
    """Verdicts."""
    from nomad_watchdog.model import VerdictState

    return _matching(start, VerdictState)


def kinds(_ctx: click.Context, _param: click.Parameter, start: str) -> list[str]:
    """First parts of kinds of events."""
    return _matching(start, KINDS)


def _from_api(ctx: click.Context, start: str, path: str, field: str, **query: object) -> list[str]:
    from nomad_watchdog.cli._answers import Page
    from nomad_watchdog.cli._global_options import given
    from nomad_watchdog.cli._options import api_of

    # No command runs, so what its options would have set is set here.
    ctx.obj = given(ctx)
    with suppress(Exception):  # nothing may disturb the prompt
        page = api_of(ctx, timeout_s=TIMEOUT_S).get(path, Page, **query)
        return _matching(start, (str(one.get(field)) for one in page["items"]))
    return []


def _before(start: str) -> str | None:
    """The cursor of a list that begins with the first ID that may begin with `start`."""
    if not start:
        return None
    last = f"{start[:-1]}{chr(ord(start[-1]) - 1)}{chr(0x10FFFF)}" if ord(start[-1]) else start[:-1]
    return base64.urlsafe_b64encode(last.encode(errors="replace")).decode().rstrip("=")


def _matching(start: str, names: Iterable[str]) -> list[str]:
    """The names that begin with `start` and that a shell can show: no control characters (S11)."""
    found = {str(name) for name in names if name.startswith(start) and name.isprintable()}
    return sorted(found)[:MAX_SHOWN]
