"""Decides which states of the device are escalated, and until when. Loaded only if escalation is configured."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from watchdog_agent.escalation.escalations import Escalations

    class Detector(Protocol):
        """The detector's state of the device."""

        reason: str
        behind: str
        was_ready: bool

        @property
        def state(self) -> str: ...
        @property
        def well(self) -> bool: ...


def update(
    escalations: Escalations, detector: Detector, results: Mapping[str, object], gateway: str
) -> None:
    """Begin or end escalations after a state change. `results`: of the probes; `gateway`: its address, or "".

    With repairs, the repair runner escalates the device, because repairs come first."""
    if gateway and detector.behind and detector.was_ready:
        # A device behind a dead gateway cannot be confirmed offline, so the gateway is escalated.
        evidence = {"probes": results, "gateway": gateway}
        escalations.raise_("gateway", detector.behind, evidence)
    elif detector.well:
        escalations.clear("gateway")
    if escalations.config.get("repairs"):
        return
    if detector.state == "offline":
        evidence = {"probes": results, "reason": detector.reason}
        escalations.raise_("offline", detector.reason, evidence)
    elif detector.state == "degraded":
        raise_degraded(escalations, detector, {"probes": results})
    elif detector.well:
        escalations.clear("offline")
        escalations.clear("degraded")


def raise_degraded(
    escalations: Escalations, detector: Detector, evidence: Mapping[str, object]
) -> bool:
    """Escalate a degraded device if its class is configured to; return whether it is. Only then does this end the
    escalation of an offline device: otherwise nothing would report that the device is unhealthy."""
    if not escalations.rules["degraded"]:
        return False
    escalations.raise_("degraded", detector.reason, {**evidence, "reason": detector.reason})
    escalations.clear("offline")
    return True
