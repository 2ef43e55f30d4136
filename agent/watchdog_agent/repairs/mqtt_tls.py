"""A message to an MQTT broker over TLS. Loaded only where a step asks for it."""

from __future__ import annotations

from watchdog_agent.probes import tls as probe_tls
from watchdog_agent.repairs import mqtt
from watchdog_agent.runtime import tls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Address, Fetched, Step


class SecurePublish(mqtt.Publish, tls.SecureFetch):
    """Its words are MQTT's, its wire is TLS."""


def begin(
    loop: Loop, place: Address, packet: bytes, step: Step, timeout_s: float, answered: Fetched
) -> SecurePublish:
    """Connect over TLS, for a message."""
    fetch = SecurePublish(loop, place, packet, timeout_s, answered, step["trust"].now())
    probe_tls.named(fetch, step)
    return fetch
