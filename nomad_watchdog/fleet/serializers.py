"""Values as JSON with stable keys, for the API, `explain` and `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Final

from nomad_watchdog.core.actions import ActionKind, Move
from nomad_watchdog.core.goals import Changes, no_words
from nomad_watchdog.core.holds import hold_id
from nomad_watchdog.core.planner import Plan
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Health, Monotonic, Placement, Repairs, Report

MAX_HELD: Final = 1_000
"""Maximum number of held stops that are listed; all are counted."""
MAX_WAITING: Final = 100
"""Maximum number of devices that are listed as waiting in a roll-out; all are counted."""


def placement_json(placement: Placement) -> dict[str, object]:
    """A placement."""
    return {
        "ref": placement.ref,
        "epoch": placement.epoch,
        "state": placement.state.value,
        "node": placement.node,
        "instances": list(placement.instances),
        "spec_hash": placement.spec_hash,
        "restarts": placement.restarts,
        "reason": placement.reason,
        "created_at": placement.created_at,
        "ready": placement.ready,
        "backend": placement.backend,
    }


def desired_json(record: DeviceRecord) -> dict[str, object]:
    """The desired state in the registry."""
    return {
        "presence": record.presence.value,
        "class": record.device.agent_class,
        "address": record.device.address,
        "generation": record.generation,
        "epoch": record.epoch,
        "accepted_instance": record.instance,
        "registry_index": record.index,
    }


def health_json(health: Health | None) -> dict[str, object] | None:
    """Consul's health check."""
    if health is None:
        return None
    return {
        "status": health.status,
        "epoch": health.epoch,
        "node": health.node,
        "output": health.output[:256],
    }


def device_of(placements: Mapping[Slug, tuple[Placement, ...]], slug: Slug) -> str:
    """The ID of the device of these placements, as the scheduler has it; "" = unknown."""
    return next((placement.device_id for placement in placements.get(slug, ())), "")


def repairs_json(repairs: Repairs | None, most: int = 32) -> dict[str, object]:
    """An agent's repairs and its last `most` attempts; empty for a class without repairs."""
    if repairs is None:
        return {}
    return {"repairs": asdict(replace(repairs, attempts=repairs.attempts[-most:]))}


def report_json(report: Report | None, now: Monotonic) -> dict[str, object] | None:
    """A report and its age in seconds."""
    if report is None:
        return None
    fields: dict[str, object] = {
        name: getattr(report, name)
        for name in ("epoch", "instance", "ready", "was_ready", "misses", "confirmed", "reason")
    }
    fields |= repairs_json(report.repairs)
    return {**fields, "state": report.state.value, "age_s": round(now - report.received_at, 1)}


def rollouts_json(plan: Plan, window: int, changes: Changes = no_words) -> list[dict[str, object]]:
    """Replacements by agent class and by change: their number, and how many of them wait."""
    found: dict[tuple[str, str], list[bool]] = {}
    waiting = {action.slug for action in plan.waiting}
    for action in (*plan.actions, *plan.waiting):
        if action.kind is not ActionKind.REPLACE or action.placement is None or action.home:
            continue
        if action.move is Move.DRAIN:  # it leaves its host, and no setting changes
            continue
        of = action.placement
        change = changes(of.agent_class, of.spec_hash)
        found.setdefault((of.agent_class, change), []).append(action.slug in waiting)
    return [
        {
            "class": name,
            "devices": len(waits),
            "waiting": sum(waits),
            "at_a_time": window,
            "changes": change or "the former settings are not known",
            "text": f"class {name}: {len(waits)} to replace ({window} at a time)"
            + (f": {change}" if change else ""),
        }
        for (name, change), waits in sorted(found.items())
    ]


def plan_json(
    plan: Plan,
    registry_index: int,
    placements: Mapping[Slug, tuple[Placement, ...]],
    *,
    window: int,
    changes: Changes = no_words,
) -> dict[str, object]:
    """A plan as JSON: the actions, a summary line, and the registry index it was made at.

    `window`: the number of devices that may be between two versions at a time; `changes`: as of
    `planner.plan`."""
    held = [(device_of(placements, slug), slug, e, ref) for slug, e, ref in sorted(plan.held)]
    counts = {kind: sum(a.kind is kind for a in plan.actions) for kind in ActionKind}
    replaced = counts[ActionKind.REPLACE] + len(plan.waiting)
    at_a_time = f" ({window} at a time)" if replaced > window or plan.waiting else ""
    summary = (
        f"{counts[ActionKind.START]} to start, {replaced} to replace{at_a_time}, "
        f"{counts[ActionKind.RETIRE]} to retire"
    )
    if plan.held:
        summary += f"; {len(plan.held)} stops held"
    return {
        "actions": [
            {
                "kind": a.kind.value,
                "device": a.device_id,
                "slug": a.slug,
                "reason": a.reason,
                "epoch": int(a.epoch),
                "placement": a.placement.ref if a.placement is not None else None,
            }
            for a in plan.actions
        ],
        "summary": summary,
        "held": {
            "count": len(plan.held),
            "reason": plan.hold_reason,
            "id": hold_id(plan.held),
            "stops": [
                {"device": device, "slug": slug, "epoch": epoch, "placement": ref}
                for device, slug, epoch, ref in held[:MAX_HELD]
            ],
        },
        "waiting_rollout": plan.waiting_rollout,
        "waiting": [action.device_id for action in plan.waiting[:MAX_WAITING]],
        "rollouts": rollouts_json(plan, window, changes),
        "registry_index": registry_index,
    }
