"""Who pays for the work at hand: a request whose cost is measured, or nobody."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

SPEND: Final[ContextVar[Callable[[float], None] | None]] = ContextVar("spend", default=None)
"""Charges seconds of work to the request that is being answered."""


def charge(seconds: float) -> None:
    """Charge work that was done elsewhere, in a thread say, to the request at hand."""
    spend = SPEND.get()
    if spend is not None:
        spend(seconds)
