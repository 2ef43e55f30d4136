"""Events of agents that a judgement of their device reveals."""

from __future__ import annotations

from nomad_watchdog.fleet.events import FleetEvents
from nomad_watchdog.fleet.track import Track
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Monotonic, Report, Verdict


def reports_changed(
    events: FleetEvents,
    slug: Slug,
    found: Verdict,
    report: Report | None,
    now: Monotonic,
    stale_s: float,
) -> None:
    """Reports of a running agent no longer arrive, or arrive again. `report`: the last one."""
    if found.unheard is not None:
        events.note(slug, "agent.unheard", found.reason, why=found.unheard.value)
        return
    fresh = report is not None and now - report.received_at <= stale_s
    why = "a report has reached this control plane" if fresh else "no report is expected now"
    events.note(slug, "agent.heard", f"{why}: {found.reason}" if found.reason else why)


def listing_changed(events: FleetEvents, slug: Slug, found: Verdict) -> None:
    """The scheduler no longer knows the agent that reports, or knows it again."""
    events.note(slug, "agent.unlisted" if found.unlisted else "agent.listed", found.reason)


def restarted(events: FleetEvents, slug: Slug, track: Track, new: int) -> None:
    """The scheduler has restarted the agent; `new`: how often since the last event."""
    total = track.restarts[1]
    times = "" if new == 1 else f", {new} times since the last event"
    why = f": {track.died_of}" if track.died_of else ""
    text = f"the scheduler restarted the agent (restart {total} of its placement{times}){why}"
    track.died_of = ""
    events.note(slug, "agent.restarted", text, restarts=total, epoch=track.restarts[0])
