"""`python -m bench.watched FILE ARGUMENT…`: the real `nomad-watchdog ARGUMENT…`, whose passes are noted in FILE.

One JSON line a pass: `at` (seconds of the machine's monotonic clock), the `starts` and `others` (stops and
replacements) that it planned, and the slugs of its starts. The program is not changed otherwise.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from nomad_watchdog import app, cli
from nomad_watchdog.core.planner import Plan
from nomad_watchdog.model import ActionKind
from nomad_watchdog.reconciler import Reconciler

_MOST_NAMED = 5


class Watched(Reconciler):
    notes: Path

    def reconcile(self) -> Plan:
        plan = super().reconcile()
        at = time.monotonic()
        starts = [one.slug for one in plan.actions if one.kind is ActionKind.START]
        line = {
            "at": at,
            "starts": len(starts),
            "others": len(plan.actions) - len(starts) + len(plan.held),
            "slugs": starts[:_MOST_NAMED],
        }
        with self.notes.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return plan


if __name__ == "__main__":
    Watched.notes = Path(sys.argv[1])
    app.Reconciler = Watched  # type: ignore[misc]
    cli.main(sys.argv[2:])
