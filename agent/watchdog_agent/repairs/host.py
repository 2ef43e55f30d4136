"""The interface that repairs need from their agent; for type checkers only."""

from __future__ import annotations

from typing import Protocol

from watchdog_agent.detection.prober import Prober
from watchdog_agent.escalation.escalations import Escalations
from watchdog_agent.runtime.loop import Loop
from watchdog_agent.runtime.types import Config


class RepairHost(Protocol):
    """The agent that runs the repairs."""

    loop: Loop
    config: Config
    instance: str
    folder: str
    exit_code: int | None
    prober: Prober
    escalations: Escalations | None

    def log(self, message: str, **facts: object) -> None: ...
    def save(self) -> bool: ...
    def send_report(self) -> None: ...
    def round_done(self) -> bool: ...
