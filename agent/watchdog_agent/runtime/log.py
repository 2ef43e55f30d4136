"""Log output: one JSON object per line on stderr, and to the configured log shippers."""

from __future__ import annotations

import os
import select
import time

from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


shippers: list[Callable[[str], None]] = []
"""Additional receivers of log lines; there is one agent per process."""


def log(message: str, **facts: object) -> None:
    """Write one JSON object of limited size as a line to stderr. Write errors are ignored."""
    cut = {k: v[:300] if isinstance(v, str) else v for k, v in facts.items()}
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    # RFC 3339, UTC, like the control plane's log.
    facts = {"ts": f"{stamp}.{int(now % 1 * 1000):03d}Z", "msg": message[:300], **cut}
    try:
        for ship in shippers:
            ship(json.dumps(facts))
        # Writable means 4 KiB free in a pipe, so a reader that stopped reading cannot block the agent.
        if select.select((), (2,), (), 0)[1]:
            os.write(2, json.dumps(facts).encode() + b"\n")
    except (OSError, ValueError):
        pass
