"""When the repair ladder escalates: no step is left, or none may be taken and no control plane will decide."""

from __future__ import annotations

import time

from watchdog_agent.repairs import authority

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from watchdog_agent.repairs.host import RepairHost
    from watchdog_agent.repairs.ladder import Ladder
    from watchdog_agent.runtime.types import Document

MAX_REPORTED: Final = 5
"""Maximum number of attempts in a report and in an escalation."""


class LadderEscalation:
    """Escalates the device of `agent` for its repair ladder."""

    def __init__(
        self, agent: RepairHost, ladder: Ladder, authority: authority.ActAuthority
    ) -> None:
        self.agent, self.ladder, self.authority = agent, ladder, authority

    def exhausted(self, why: str) -> None:
        """No step is left: escalate once per episode. The escalation and its flag are stored together, so that
        a crash loses both or neither. A degraded device is escalated by the rule of its class."""
        state = self.agent.prober.detector.state
        if state == "degraded":
            self._degraded()
        elif not self.ladder.escalated and not self.authority.doubt:
            self._offline(why)

    def blocked(self, why: str) -> None:
        """The next step may not be taken. Escalate if the control plane does not answer, or if no step can ever be
        taken: two escalations are better than none. A doubt came from a control plane that knows the device, so
        the agent waits in that case."""
        if self.ladder.escalated or self.authority.doubt or why == authority.ASK:
            return
        agent = self.agent
        unanswered = self.authority.unanswered_at is not None or not agent.config.get("api")
        if (unanswered or not agent.folder) and agent.prober.detector.state in (
            "offline",
            "degraded",
        ):
            self.exhausted(why)

    def _offline(self, why: str) -> None:
        agent, detector = self.agent, self.agent.prober.detector
        self.ladder.escalated = True
        agent.log("repairs are given up", reason=why)
        if agent.escalations is not None:
            evidence = {
                "state": detector.state,
                "misses": detector.misses,
                "probes": agent.prober.results,
                "repairs": self._attempts(),
            }
            agent.escalations.raise_("offline", detector.reason[:400], evidence)
        agent.save()
        agent.send_report()

    def _degraded(self) -> None:
        """Escalate a degraded device. One that was offline before is escalated again when it is offline again."""
        agent = self.agent
        if self.authority.doubt or agent.escalations is None:
            return
        from watchdog_agent.escalation import triggers

        evidence = {"probes": agent.prober.results, "repairs": self._attempts()}
        if triggers.raise_degraded(agent.escalations, agent.prober.detector, evidence):
            self.ladder.escalated = False

    def _attempts(self) -> list[Document]:
        return self.ladder.attempts_json(time.monotonic(), MAX_REPORTED)

    def recovered(self) -> None:
        """The device answers again: end its escalations."""
        if self.agent.escalations is not None:
            if self.ladder.escalated:
                self.agent.escalations.clear("offline")
            self.agent.escalations.clear("degraded")
        self.ladder.escalated = False
