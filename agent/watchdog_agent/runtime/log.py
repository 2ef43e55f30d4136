"""One JSON object a line on stderr, and wherever else lines are shipped."""

from __future__ import annotations

import os
import select
import time

from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


shippers: list[Callable[[str], None]] = []
"""Where log lines go besides stderr; one agent a process."""


def log(message: str, **facts: object) -> None:
    """Write one JSON object per line to stderr, of limited size. Errors of stderr are ignored."""
    cut = {k: v[:300] if isinstance(v, str) else v for k, v in facts.items()}
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    # RFC 3339, UTC, as in the control plane's log
    facts = {"ts": f"{stamp}.{int(now % 1 * 1000):03d}Z", "msg": message[:300], **cut}
    try:
        for ship in shippers:
            ship(json.dumps(facts))
        # Writable means 4 KiB free in a pipe: a reader that stopped reading can't stop us.
        if select.select((), (2,), (), 0)[1]:
            os.write(2, json.dumps(facts).encode() + b"\n")
    except (OSError, ValueError):
        pass
