"""A message to an MQTT broker over TLS. Loaded only where a step asks for it."""

from __future__ import annotations

from . import probe_tls, repair_mqtt, tls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loop import Loop
    from .shapes import Address, Fetched, Step


class SecurePublish(repair_mqtt.Publish, tls.SecureFetch):
    """Its words are MQTT's, its wire is TLS."""


def begin(
    loop: Loop, place: Address, packet: bytes, step: Step, timeout_s: float, answered: Fetched
) -> SecurePublish:
    """Connect over TLS, for a message."""
    fetch = SecurePublish(loop, place, packet, timeout_s, answered, step["trust"].now())
    probe_tls.named(fetch, step)
    return fetch
