"""A query whose value must stay within limits while a version is on trial. Pure.

A value outside of the limits several times in a row makes the version bad. A query that can't be read says nothing: the
step waits for it, and the version is given up when that lasts too long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nomad_watchdog.model import Monotonic


@dataclass(frozen=True, slots=True)
class Analysis:
    """The query, and the limits of its value."""

    url: str
    """Of Prometheus."""
    query: str
    minimum: float = -math.inf
    maximum: float = math.inf
    failures: int = 3
    """Number of values in a row outside of the limits that make the version bad."""
    interval_s: float = 30.0
    timeout_s: float = 5.0
    token_file: str = ""


@dataclass(frozen=True, slots=True)
class QueryValue:
    """`value`: None if it can't be read; `problem` has the cause."""

    value: float | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the values of one step have shown."""

    failures: int = 0
    """Values outside of the limits since the last one inside."""
    passed: bool = False
    """The query was read last, and its value was within the limits."""
    words: str = "the query has not been read yet"
    unread_since: Monotonic | None = None
    """When it could not be read for the first time since it was read; None = it was read."""


def after(rules: Analysis, before: Measured, found: QueryValue, now: Monotonic) -> Measured:
    """What is known after one more reading."""
    value = found.value
    if value is None or not math.isfinite(value):
        since = now if before.unread_since is None else before.unread_since
        words = f"the query can't be read: {found.problem or 'it returns no number'}"
        return replace(before, passed=False, words=words, unread_since=since)
    if rules.minimum <= value <= rules.maximum:
        return Measured(passed=True, words=f"the query returns {value:g}")
    limit = (
        f"less than {rules.minimum:g} (min)"
        if value < rules.minimum
        else f"more than {rules.maximum:g} (max)"
    )
    failures = before.failures + 1
    times = f", {failures} times in a row" if failures > 1 else ""
    return Measured(failures, words=f"the query returns {value:g}, {limit}{times}")


def why_bad(rules: Analysis, seen: Measured, now: Monotonic, deadline_s: float) -> str:
    """Why the version is bad, in words; "" = it is not, as far as known. `deadline_s`: maximum time without a value."""
    if seen.failures >= rules.failures:
        return f"{seen.words} (rollout.analysis)"
    if seen.unread_since is not None and now - seen.unread_since > deadline_s:
        return f"{seen.words}, for {deadline_s:.0f} s (rollout.progress_deadline)"
    return ""
