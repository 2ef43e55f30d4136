"""What users can request of a rebalance: show, preview, begin, pause, resume and abort it."""

from __future__ import annotations

from collections import Counter
from typing import Final

from nomad_watchdog.controllers.rebalance import RebalanceController
from nomad_watchdog.controllers.rebalance_state import rebalance_json
from nomad_watchdog.core import rebalance
from nomad_watchdog.core.host_balance import allowed, plan_moves, spread
from nomad_watchdog.core.rebalance import AgentsByHost, Rebalance
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.model import WallTime

MAX_LISTED: Final = 1_000
"""Maximum number of devices that a preview lists; all are counted."""
_EVENTS: Final = {"pause": "paused", "resume": "resumed", "abort": "aborted"}
_NONE: Final = Rebalance("", WallTime(0.0), "")


class RebalanceRequests:
    """The requests to one `RebalanceController`."""

    def __init__(self, fleet: Fleet, controller: RebalanceController) -> None:
        self._fleet = fleet
        self._controller = controller

    async def preview(self, new: Rebalance) -> dict[str, object]:
        """What a rebalance would do; nothing is changed. Raises ConflictError while one is in progress, and what the
        scheduler raises when its hosts can't be listed."""
        controller = self._controller
        await controller.refresh()
        rebalance.begin(controller.now, new)
        view = await controller.view(new)
        leave = plan_moves(view.counts, view.movable, view.in_flight).leave
        leave = leave[: new.left]
        planned = Counter(one.node for one in leave)
        received = plan_moves(
            view.counts, {host: some[: planned[host]] for host, some in view.movable.items()}, 0
        ).receive
        return {
            **rebalance_json(new),
            "to_move": len(leave),
            "balanced": spread(view.counts) <= allowed(view.counts),
            "steers": controller.steers,
            "hosts": [
                {
                    "host": host,
                    "agents": count,
                    "after": count - planned[host] + received.get(host, 0),
                }
                for host, count in sorted(view.counts.items())
            ],
            "moves": [{"device": one.device_id, "from": one.node} for one in leave[:MAX_LISTED]],
        }

    async def begin(self, new: Rebalance) -> dict[str, object]:
        """Start a rebalance; durable when it returns. Raises as `preview`."""
        preview = await self.preview(new)
        await self._controller.change(lambda kept: rebalance.begin(kept, new))
        self._controller.report("started", new, f"{preview['to_move']} devices to move")
        return preview

    async def control(self, what: str) -> dict[str, object]:
        """`pause`, `resume` or `abort` the rebalance in progress.

        Raises NotFoundError when there is none, PreconditionError when its state does not allow it."""
        changed: list[tuple[Rebalance | None, Rebalance]] = []

        def how(kept: Rebalance | None) -> Rebalance:
            new = rebalance.control(kept, what)
            changed[:] = [(kept, new)]
            return new

        await self._controller.change(how)
        ((old, new),) = changed
        if new != old:
            self._controller.report(_EVENTS[what], new, "")
        return rebalance_json(new)

    async def view(self) -> dict[str, object]:
        """The last rebalance, and the agents per host. Raises as `preview`."""
        controller = self._controller
        await controller.refresh()
        now = controller.now
        view = await controller.view(now or _NONE)
        return {
            "items": [] if now is None else [rebalance_json(now) | _needed(now, view)],
            "hosts": [
                {"host": host, "agents": count} for host, count in sorted(view.counts.items())
            ],
            "spread": spread(view.counts),
            "allowed": allowed(view.counts),
            "steers": controller.steers,
            "problem": controller.problem,
        }


def _needed(now: Rebalance, view: AgentsByHost) -> dict[str, object]:
    if now.is_over:
        return {"waiting": 0}
    needed = len(plan_moves(view.counts, view.movable, view.in_flight).leave)
    return {"waiting": min(needed, now.left)}
