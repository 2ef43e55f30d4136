"""Types of /status, for type checkers only."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from watchdog_agent.runtime.types import Document


class ProbeStats(TypedDict):
    """The last results of a probe; latencies are None if all of them were lost."""

    count: int
    loss: float
    min_s: float | None
    mean_s: float | None
    p50_s: float | None
    p95_s: float | None
    max_s: float | None


class ProbeResult(TypedDict):
    """The last result of a probe."""

    ok: bool
    outcome: str
    reason: str
    took_s: float
    warning: NotRequired[str]
    at: NotRequired[float]


class ProbeStatus(ProbeResult):
    """A probe in /status."""

    stats: ProbeStats


class RunCounts(TypedDict):
    """Probe runs."""

    total: int
    failed: int
    unable: int


class ProberStatus(TypedDict):
    """The probes' part of /status."""

    was_ready: bool
    misses: int
    confirmed: bool
    probes: dict[str, ProbeStatus]
    runs: RunCounts
    evidence: Document
    history: list[Document]


class ReportCounts(TypedDict):
    """Reports in /status."""

    sent: int
    failed: int
    dropped: int
    trouble: str


class LogCounts(TypedDict):
    """Log lines in /status."""

    shipped: int
    dropped: int
    refused: int


class RepairStatus(TypedDict):
    """Repairs in /status."""

    active: str
    exhausted: bool
    dry_run: bool
    blocked: str
    steps: list[str]
    outcomes: dict[str, int]
    attempts: list[Document]


class EscalationStatus(TypedDict):
    """Escalations in /status."""

    open: list[Document]
    queued: int
    sent: int
    failed: int
    dropped: int
    last_error: str


class Status(ProberStatus):
    """The body of /status."""

    device_id: str
    slug: str
    epoch: int
    version: str
    instance: str
    pid: int
    ready: bool
    state: str
    reason: str
    state_age_s: float
    uptime_s: float
    reports: ReportCounts
    repairs: NotRequired[RepairStatus]
    escalations: NotRequired[EscalationStatus]
    logs: NotRequired[LogCounts]
