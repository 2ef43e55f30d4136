"""A probe and a repair step of a third party, as entry points of the agent."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from watchdog_agent.runtime.types import (
    Cancellable,
    PluginAnswer,
    PluginLoop,
    ProbePlugin,
    RepairPlugin,
)


def probe(
    loop: PluginLoop,
    settings: Mapping[str, object],
    address: str,
    timeout_s: float,
    ended: PluginAnswer,
) -> None:
    """An entry point of the group `watchdog_agent.probes`."""
    port = settings.get("port")
    if not isinstance(port, int):
        ended(None, "settings.port is not a number")
        return
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.sendto(b"hello", (address, port))

    def received(mask: int) -> None:
        loop.forget(sock)
        ended(bool(mask) and sock.recv(512) == b"well", "answered")

    loop.watch(sock, 1, received)
    loop.later(timeout_s / 2, lambda: ended(False, "no answer"))


class Run:
    """A repair step that can be cancelled."""

    def __init__(self, ended: PluginAnswer) -> None:
        self._ended: PluginAnswer | None = ended

    def finish(self) -> None:
        if self._ended is not None:
            self._ended(True, "restarted")

    def cancel(self) -> None:
        self._ended = None


def repair(
    loop: PluginLoop, step: Mapping[str, object], device: Mapping[str, object], ended: PluginAnswer
) -> Cancellable | None:
    """An entry point of the group `watchdog_agent.repairs`."""
    if "id" not in device or step.get("kind") != "plugin":
        ended(False, "no device")
        return None
    run = Run(ended)
    loop.later(1.0, run.finish)
    return run


def repair_at_once(_loop: PluginLoop, _step: object, _device: object, ended: PluginAnswer) -> None:
    """A step that needs no cancellation returns None, and may accept wider types."""
    ended(True, "done")


PROBES: Mapping[str, ProbePlugin] = {"udp": probe}
REPAIRS: Mapping[str, RepairPlugin] = {"restart": repair, "at-once": repair_at_once}
