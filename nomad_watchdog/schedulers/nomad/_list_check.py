"""Detects a list of jobs that is incomplete.

A list can have status 200 and lack jobs (a proxy, a bug, a lost page). The control plane would start a second
agent for each device that is missing from it (S3); the mass-stop breaker does not prevent starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from nomad_watchdog.clients.nomad_rows import Allocation


def unlisted(listed: AbstractSet[str], allocs: Iterable[Allocation], index: int) -> set[str]:
    """Jobs with a running allocation that the list of jobs, read before at `index`, lacks."""
    return {
        one["JobID"]
        for one in allocs
        if one["JobID"] not in listed
        and one["ClientStatus"] == "running"
        and one.get("DesiredStatus") == "run"
        and one.get("CreateIndex", index) < index
    }
