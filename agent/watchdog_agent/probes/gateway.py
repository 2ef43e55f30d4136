"""The gateway between the agent and its device. While it does not answer, the state of the device is unknown: twelve
devices behind one dead gateway are one failure."""

from __future__ import annotations

import time

from watchdog_agent.config import probes
from watchdog_agent.probes import builtin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Document, Outcome, Probe

FRESH_S = 1.0
"""Maximum age of a result that a repair relies on, seconds."""


class Gateway:
    """Probed only when the device's probes fail."""

    def __init__(self, loop: Loop, spec: Probe) -> None:
        self.loop, self.spec = loop, spec
        self.address: str = spec["address"]
        self.answers: bool | None = None
        """The last outcome; None = not probed, unable to probe, or the device has answered since."""
        self.reason = ""
        self.probed_at = float("-inf")
        self._waiting: list[Callable[[Outcome], None]] = []

    def probe(self, then: Callable[[Outcome], None]) -> None:
        """Probe the gateway and call back with the outcome. Calls during a probe share its result."""
        self._waiting.append(then)
        if len(self._waiting) == 1:
            builtin.start(self.loop, self.spec, self.address, self._probed)

    def _probed(self, ok: Outcome, reason: str, _took_s: float, _warning: str) -> None:  # as Probed
        if not ok and self.spec.get("instead"):
            ok = None  # a port that is not configured: no answer from it is not evidence
        self.answers, self.reason = ok, reason
        self.probed_at = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then(ok)

    def fresh(self) -> bool:
        """Whether it was probed within the last FRESH_S seconds."""
        return time.monotonic() - self.probed_at < FRESH_S

    def describe(self) -> str:
        """The device's reason while the gateway is dead or cannot be probed."""
        if self.answers is None:
            return f"gateway {self.address}: {self.reason}"
        return f"gateway {self.address} does not answer"

    def evidence(self) -> Document:
        """The gateway's part of /status."""
        kind = probes.name_of(self.spec)
        shown = {"address": self.address, "probe": kind, "answers": self.answers}
        return {**shown, "reason": self.reason}
