"""Whether this agent may act on its device (S3), as far as an agent can know. Pure: takes `now`.

The rule: accepted at the last contact, and not refused since. A 2xx is valid for some report intervals. After that
the agent sends a report to ask the control plane again. If no answer arrives, the last 2xx stays valid (L3) until
`alone_s` has passed, which limits how long a replaced agent can act while disconnected.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from watchdog_agent.runtime.types import Document

ASK = "the last acceptance is too old; asking"


class ActAuthority:
    """The last answer of the control plane. Times are in seconds of one clock."""

    def __init__(self, fresh_s: float, alone_s: float) -> None:
        self.fresh_s = fresh_s
        self.alone_s = alone_s
        self.accepted_at: float | None = None
        self.unanswered_at: float | None = None
        """When a report last got no answer."""
        self.doubt = ""
        self.held = False
        """The control plane forbids repairs: the version of the agent is on trial."""

    def report_answered(self, status: int | None, now: float, *, held: bool = False) -> None:
        """Record a report's status; None = no answer. `held`: the answer forbids repairs."""
        if status == 200:
            self.accepted_at, self.unanswered_at, self.held = now, None, held
            if self.doubt != "refused":
                self.doubt = ""
        elif status == 410:
            self.doubt = "refused"
        elif status is None or status >= 500 or status in (408, 425, 429):
            self.unanswered_at = now
        elif self.doubt != "refused":
            self.doubt = f"a report was answered with {status}"

    def why_not(self, now: float) -> str:
        """Why no step may be taken now; "" = allowed; ASK = send a report first."""
        if self.doubt:
            return self.doubt
        if self.accepted_at is None:
            return "not accepted yet"
        if self.held:
            return "its version is on trial in a roll-out"
        age_s = now - self.accepted_at
        if age_s <= self.fresh_s:
            return ""
        if self.unanswered_at is None:
            return ASK
        if age_s > self.alone_s:
            return f"no answer of the control plane for {age_s:.0f} s"
        return ""

    def dump(self, epoch: int, instance: str, now: float) -> Document:
        """For the state file: an acceptance is valid for one epoch and one instance."""
        age_s = None if self.accepted_at is None or self.doubt else now - self.accepted_at
        return {"epoch": epoch, "instance": instance, "age_s": age_s, "held": self.held}

    def restore(self, saved: Any, epoch: int, instance: str, since: float) -> None:
        """Take over from an earlier process of the same run. Raises on a malformed document."""
        if (saved["epoch"], saved["instance"]) == (epoch, instance) and saved["age_s"] is not None:
            self.accepted_at = since - float(saved["age_s"])
            self.held = saved.get("held") is True
