"""The gateway in the configuration document."""

from __future__ import annotations

from watchdog_agent import errors
from watchdog_agent.config import optional_table, validators
from watchdog_agent.config import probes as config_probes
from watchdog_agent.runtime.address import literal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.types import Document


LABEL = "gateway"
"""Device label with the address of its gateway; overrides the class's gateway address."""


def check(config: Document) -> None:
    """Put the gateway's checked probe, with its address, under `gateway`, or remove the key.

    Raises ConfigError."""
    given = config.get("gateway") or {}
    if not isinstance(given, dict):
        raise errors.ConfigError("gateway must be an object")
    labels = config.get("labels")
    named = labels.get(LABEL) if isinstance(labels, dict) else None
    # A label is external data: any other value, such as "gw-north", may be the name of a place, and resolving it
    # could block.
    address = literal(named) or given.get("address")
    config.pop("gateway", None)
    # The gateway may be a device of the same class itself; then it has no gateway.
    if not address:
        return
    address = validators.host(address, "gateway: address")
    if address == config["address"]:
        return
    spec = {
        "timeout_s": optional_table.GatewayTable.timeout_s.default,
        **given,
        "kind": given.get("kind", "icmp"),
    }
    config["gateway"] = {**config_probes.check(spec, "gateway"), "address": address}
