"""Events of roll-outs."""

from __future__ import annotations

import logging
from typing import Final

from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.model import AgentSpec

log = logging.getLogger(__name__)

STARTED: Final = "rollout.started"
STEP: Final = "rollout.step"
DONE: Final = "rollout.done"
HALTED: Final = "rollout.halted"
ROLLED_BACK: Final = "rollout.rolled_back"
CHANGED: Final = "rollout.changed"


def report(fleet: Fleet, name: str, kind: str, text: str) -> None:
    """Publish an event about a roll-out of a class, and log it."""
    log.warning(text, extra={"agent_class": name, "kind": kind})
    fleet.events.note_fleet(kind, f"class {name}, {text}", {"class": name})


def report_given_up(
    fleet: Fleet, spec: AgentSpec, back: AgentSpec, why: str, *, keep: bool
) -> None:
    """Publish that a spec was given up. `back`: the spec in force now; `keep`: agents that have the spec keep it."""
    name = spec.agent_class
    text = f"version {spec.version}: {why}"
    if back is spec:
        lost = "the template of the version before has changed, so there is no way back to it"
        report(fleet, name, HALTED, f"{text}; {lost}")
    elif keep:
        report(fleet, name, HALTED, f"{text}; agents that have it keep it (rollout.on_abort)")
    else:
        report(fleet, name, ROLLED_BACK, f"{text}; back to version {back.version}")
