"""Whether Nomad's lists may be believed: an agent that runs does not leave them without a trace.

A list can answer 200 and leave jobs out (a proxy, a bug, a lost page). Taken at its word, it would have
us start a second agent beside each that it hides (S3): a missing agent needs no breaker.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from nomad_watchdog.schedulers.nomad._view import Row


def unlisted(listed: AbstractSet[str], allocs: Iterable[Row], index: int) -> set[str]:
    """Jobs with a running allocation that the list of jobs, read before at `index`, leaves out."""
    return {
        one["JobID"]
        for one in allocs
        if one["JobID"] not in listed
        and one["ClientStatus"] == "running"
        and one.get("DesiredStatus") == "run"
        and one.get("CreateIndex", index) < index
    }
