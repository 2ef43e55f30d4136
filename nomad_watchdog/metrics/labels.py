"""The values of the metrics' labels. Each label has a fixed set of values."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import Final

from nomad_watchdog.core.acceptance import AcceptanceKind
from nomad_watchdog.core.actions import ActionOutcome

OTHER: Final = "other"
"""Replaces a label value that is not in its set, so that it does not become a new series."""


ACTIONS: Final = (*ActionOutcome, OTHER)
"""The outcome of a start or stop."""


class PassOutcome(StrEnum):
    """The outcome of a pass."""

    OK = "ok"
    HELD = "held"
    OTHER = OTHER


class CommitOutcome(StrEnum):
    """The outcome of writing a record."""

    STORED = "stored"
    CONFLICT = "conflict"
    ERROR = "error"
    OTHER = OTHER


class SchedulerErrorKind(StrEnum):
    """The kind of a scheduler error."""

    STALE = "stale"
    TRANSIENT = "transient"
    TERMINAL = "terminal"
    OTHER = OTHER


class ResyncReason(StrEnum):
    """The cause of a full read."""

    HINT = "hint"
    TIMER = "timer"
    ERROR = "error"
    OTHER = OTHER


class RefusalReason(StrEnum):
    """Why a request was refused: 401, 403, 415, 421, 429, 503."""

    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    ENCODING = "encoding"
    MISDIRECTED = "misdirected"
    LIMITED = "limited"
    BUSY = "busy"
    OTHER = OTHER


class Closing(StrEnum):
    """Why the API closed a connection."""

    ROOM = "room"
    """It was idle or slow, and another needed its place."""
    FULL = "full"
    """No other connection could make room for it."""
    RATE = "rate"
    """Its address exceeded the rate of unauthenticated requests."""
    SLOW = "slow"
    """The client read nothing of a response within the timeout."""
    OTHER = OTHER


STATUS_CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")
REPORTS: Final = (*(kind.value for kind in AcceptanceKind), "replaced", OTHER)
"""`replaced`: refused because its agent was replaced."""


def known(value: str, allowed: type[StrEnum] | tuple[str, ...]) -> str:
    """The value if it is allowed, else OTHER."""
    return value if value in _values(allowed) else OTHER


@cache
def _values(allowed: type[StrEnum] | tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(str, allowed))
