"""What stands between the agent and its device. While it is dead nothing can be said of the device: twelve
devices behind one dead gateway are one dead gateway."""

from __future__ import annotations

import time

from watchdog_agent import errors
from watchdog_agent.config import probes as config_probes
from watchdog_agent.config import validators
from watchdog_agent.probes import builtin
from watchdog_agent.runtime.address import literal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Config, Document, Outcome

LABEL = "gateway"
"""A device's label with the address of its gateway; it goes before the class's."""
TIMEOUT_S = 2.0
FRESH_S = 1.0
"""An answer is good for so long where something is done because of it."""


def check(config: Config) -> None:
    """Put the gateway's checked probe, with its address, under `gateway`, or take the key away.

    Raises ConfigError."""
    given: Any = config.get("gateway") or {}
    if not isinstance(given, dict):
        raise errors.ConfigError("gateway must be an object")
    labels = config.get("labels")
    named = labels.get(LABEL) if isinstance(labels, dict) else None
    # A label is data from outside: any other name, as "gw-north", may mean a place, and looking it up
    # could block.
    address = literal(named) or given.get("address")
    config.pop("gateway", None)
    # The gateway may be watched as a device too, with the same class: then nothing stands before it.
    if not address:
        return
    address = validators.host(address, "gateway: address")
    if address == config["address"]:
        return
    spec = {"timeout_s": TIMEOUT_S, **given, "kind": given.get("kind", "icmp")}
    config["gateway"] = {**config_probes.check(spec, "gateway"), "address": address}


class Gateway:
    """Asked when the device's probes fail, and at no other time."""

    def __init__(self, loop: Loop, spec: Document) -> None:
        self.loop, self.spec = loop, spec
        self.address: str = spec["address"]
        self.answers: bool | None = None
        """What it did last; None = not asked or unable to ask, or the device has answered since."""
        self.reason = ""
        self.asked_at = float("-inf")
        self._waiting: list[Callable[[Outcome], None]] = []

    def ask(self, then: Callable[[Outcome], None]) -> None:
        """Probe it, and call back with the outcome; who asks meanwhile gets the same answer."""
        self._waiting.append(then)
        if len(self._waiting) == 1:
            builtin.start(self.loop, self.spec, self.address, self._asked)

    def _asked(self, ok: Outcome, reason: str, _took_s: float, _warning: str) -> None:  # as Probed
        if not ok and self.spec.get("instead"):
            ok = None  # a port that nobody chose: its silence says nothing
        self.answers, self.reason = ok, reason
        self.asked_at = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then(ok)

    def fresh(self) -> bool:
        """Whether it was asked just now."""
        return time.monotonic() - self.asked_at < FRESH_S

    def words(self) -> str:
        """The device's reason while it is dead, or cannot be asked."""
        if self.answers is None:
            return f"gateway {self.address}: {self.reason}"
        return f"gateway {self.address} does not answer"

    def evidence(self) -> Document:
        """For /status."""
        kind = builtin.name_of(self.spec)
        shown = {"address": self.address, "probe": kind, "answers": self.answers}
        return {**shown, "reason": self.reason}
