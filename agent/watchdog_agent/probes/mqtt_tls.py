"""MQTT over TLS: the same dialogue after a handshake. Loaded only where a probe asks for it."""

from __future__ import annotations

from watchdog_agent.probes import tls as probe_tls
from watchdog_agent.probes.mqtt import Dialogue
from watchdog_agent.runtime import tls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Address, Fetched, Probe


class SecureDialogue(Dialogue, tls.SecureFetch):
    """Its words are MQTT's, its wire is TLS."""


def begin(
    loop: Loop, place: Address, packet: bytes, spec: Probe, timeout_s: float, answered: Fetched
) -> SecureDialogue:
    """CONNECT over TLS; `answered` gets the code of CONNACK as its status."""
    dialogue = SecureDialogue(loop, place, packet, timeout_s, answered, spec["trust"].now())
    probe_tls.named(dialogue, spec)
    return dialogue
