"""Charges work to the current request, if its cost is measured."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

SPEND: Final[ContextVar[Callable[[float], None] | None]] = ContextVar("spend", default=None)
"""Charges seconds of work to the current request; None = not measured."""


def charge(seconds: float) -> None:
    """Charge work that was done elsewhere, for example in a thread, to the current request."""
    spend = SPEND.get()
    if spend is not None:
        spend(seconds)
