"""Runs an agent briefly before the fork, so that the memory it initializes is shared by all agents."""

from __future__ import annotations

import os

from watchdog_agent.agent import Agent
from watchdog_agent.config import document
from watchdog_agent.runtime.stdlib_light import json, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.types import Document

PROBES = 10
"""Number of probes of each kind. They run concurrently, so they take no longer than one."""
RUNS = 60
"""Number of probe runs. CPython specializes code after eight runs, and then leaves it unchanged."""
LONGEST_S = 2.0


def warm() -> None:
    """Run an agent against its own HTTP server on 127.0.0.1; no packet leaves the host.

    It registers, probes, reports and serves for a moment, and is then discarded. Raises OSError if it cannot start."""
    taken = socket.socket()
    try:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    finally:
        taken.close()
    agent = Agent(document.check(_document(port)), {"WATCHDOG_LISTEN": f"127.0.0.1:{port}"})
    _quietly(agent)
    agent.server.close()
    agent.loop.close()


def _document(port: int) -> Document:
    here = f"http://127.0.0.1:{port}"
    probe = {"port": port, "interval_s": 0.05, "timeout_s": 0.5}
    return {
        "v": 1,
        "device_id": "none",
        "slug": "none",
        "epoch": 1,
        "address": "127.0.0.1",
        "api": [here],
        "consul": here,
        "beat_s": 0.1,
        "probes": [{"kind": "http", "path": "/status", **probe}, {"kind": "tcp", **probe}] * PROBES,
        "confirm": [{"kind": "tcp", **probe}],
    }


def _quietly(agent: Agent) -> None:
    """Run it with its log discarded until RUNS probes have run, for at most LONGEST_S."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)

    def look() -> None:
        if agent.prober.runs >= RUNS:
            agent.loop.stop()
        else:
            agent.loop.later(0.01, look)

    try:
        agent.loop.later(LONGEST_S, agent.loop.stop)
        agent.loop.later(0.0, look)
        agent.live()
        json.dumps(agent.status())
        agent.answer("/metrics")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
