"""The condition of a device: a fault that belongs to the device, not to the agent that reported it.

An outage outlives its agent. While an agent is replaced, silent or not ready, the verdict and its start time stay the
same until an accepted agent has probed the device and reports another state. Only a verdict that `decides` changes
the condition. The registry is therefore written when a condition begins, when it ends, and when its reason becomes
one of another kind, but never per report.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from nomad_watchdog.model import (
    MAX_REASON,
    Condition,
    ConditionState,
    Verdict,
    VerdictState,
    WallTime,
)

_OF: Final = {
    VerdictState.OFFLINE: ConditionState.OFFLINE,
    VerdictState.DEGRADED: ConditionState.DEGRADED,
}
_MEASURED: Final = re.compile(r"\d+(?:\.\d+)?(?: ?%| ?(?:ms|s|min|h|d|days?|times|probes)\b)")
"""The part that may differ between reasons of one kind: a number with its unit."""
RENEW_S: Final = (5.0, 300.0)
"""First and maximum time between two renewals of a condition, in seconds; it doubles, because a reason may
alternate."""
_SHOWN: Final = {condition: verdict for verdict, condition in _OF.items()}


def after(
    found: Verdict, kept: Condition | None, began_at: WallTime, misses: int, *, renew: bool = False
) -> Condition | None:
    """The condition that the device has after a verdict on its agent (`verdict.of_agent`).

    `kept`: the condition so far. `began_at`: when the state of this verdict began, unix seconds. `renew`: a reason of
    another kind replaces the stored one, because the agent confirms the condition for the first time, or because the
    last renewal is long enough ago (`renew_after_s`).
    """
    if found.state is VerdictState.DEPARTED:
        return None
    if not found.decides or found.state is VerdictState.SUSPECT:
        return kept
    state = _OF.get(found.state)
    if state is None:
        return None
    reason = _bounded(found.reason)
    if kept is not None and kept.state is state:
        other = renew and kind_of(reason) != kind_of(kept.reason)
        return replace(kept, reason=reason, misses=misses) if other else kept
    return Condition(state, began_at, reason, misses)


def kind_of(reason: str) -> str:
    """A reason without its measured values. A change between two reasons of one kind is not written."""
    return _MEASURED.sub("#", reason)


def renew_after_s(renewals: int) -> float:
    """Minimum time until the next renewal of a condition, in seconds. `renewals`: number so far, at least 1."""
    return min(RENEW_S[0] * 2.0 ** min(renewals - 1, 16), RENEW_S[1])


def shown(found: Verdict, kept: Condition | None, *, replaced: bool) -> Verdict:
    """The displayed verdict: the kept condition, unless the accepted agent has just decided.

    `replaced`: no accepted agent has reported at the record's epoch yet."""
    if kept is None or found.decides or found.state is VerdictState.DEPARTED:
        return found
    return replace(
        found,
        state=_SHOWN[kept.state],
        reason=f"{kept.reason}; {_meanwhile(found, replaced=replaced)}",
        agent=found.state,
    )


def same(one: Condition | None, other: Condition | None) -> bool:
    """Whether two conditions have the same state, so that no write is needed: times and reasons differ between
    replicas."""
    return (one and one.state) == (other and other.state)


def _meanwhile(found: Verdict, *, replaced: bool) -> str:
    match found.state:
        case VerdictState.WATCHED:
            return "its agent has not reported here yet"
        case VerdictState.SUSPECT:
            return "its agent is checking this"
        case VerdictState.REPAIRING:
            return found.reason
        case VerdictState.STARTING if replaced:
            return f"its agent is being replaced ({found.reason})"
        case VerdictState.STARTING:
            return f"its agent has not confirmed this yet ({found.reason})"
        case _:
            return f"its agent can't check this now ({found.reason})"


def _bounded(reason: str) -> str:
    return reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 1]}…"
