"""The interface that the prober needs from its agent; for type checkers only."""

from __future__ import annotations

from typing import Protocol

from watchdog_agent.runtime.loop import Loop
from watchdog_agent.runtime.types import Config, Outcome


class ProbeHost(Protocol):
    """The agent that runs the probes."""

    loop: Loop
    config: Config
    exit_code: int | None

    def changed(self) -> None: ...
    def probed(self, outcome: Outcome) -> None: ...
    def confirmed(self) -> None: ...
    def gateway_answers(self) -> None: ...
    def watch_ready(self) -> None: ...
