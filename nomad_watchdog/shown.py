"""Values as the API, `explain` and `plan` show them: plain JSON with stable keys."""

from __future__ import annotations

from nomad_watchdog.core.planner import Plan
from nomad_watchdog.model import ActionKind, Monotonic, Placement, Report


def shown_placement(placement: Placement) -> dict[str, object]:
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
    }


def shown_report(report: Report | None, now: Monotonic) -> dict[str, object] | None:
    """A report and its age in seconds."""
    if report is None:
        return None
    shown = {
        name: getattr(report, name)
        for name in ("epoch", "instance", "ready", "was_ready", "misses", "confirmed", "reason")
    }
    return {**shown, "state": report.state.value, "age_s": round(now - report.received_at, 1)}


def shown_plan(plan: Plan, registry_index: int) -> dict[str, object]:
    """A plan as JSON: the actions, a summary line, and the index that it was made at."""
    counts = {kind: sum(a.kind is kind for a in plan.actions) for kind in ActionKind}
    summary = (
        f"{counts[ActionKind.START]} to start, {counts[ActionKind.REPLACE]} to replace, "
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
        "held": {"count": len(plan.held), "reason": plan.hold_reason},
        "waiting_rollout": plan.waiting_rollout,
        "registry_index": registry_index,
    }
