"""Derives events and reasons from the repairs that an agent reports."""

from __future__ import annotations

from typing import Final

from nomad_watchdog.model import RepairAttempt, Repairs

UNDER_WAY: Final = ("running", "verifying")
MAX_NAMED: Final = 3


def news(before: Repairs | None, after: Repairs | None) -> tuple[RepairAttempt, ...]:
    """The attempts that have ended since the previous report; each is published once.

    Empty without a previous report: after a start of the control plane, they were published by the process before it.
    """
    if before is None or after is None:
        return ()
    known = {attempt.number: attempt.outcome for attempt in before.attempts}
    newest = max(known, default=0)
    return tuple(
        attempt
        for attempt in after.attempts
        if attempt.outcome not in UNDER_WAY
        and (attempt.number > newest or known.get(attempt.number) in UNDER_WAY)
    )


def in_words(repairs: Repairs | None) -> str:
    """The failed attempts, as a suffix of a reason; "" = the agent has not exhausted its repairs."""
    if repairs is None or not repairs.exhausted or not repairs.attempts:
        return ""
    named = [f"{a.step} ({a.outcome})" for a in repairs.attempts[-MAX_NAMED:]]
    return f"; tried: {', '.join(named)}"
