"""Third-party repair steps: entry points of the group `watchdog_agent.repairs`.

An entry point names a callable `start(loop, step, device, ended)` that must not block, calls `ended(ok, reason)` once,
and returns an object with `cancel()`, or None. An exception from it or from any of its callbacks makes the step
fail.
"""

from __future__ import annotations

from watchdog_agent.runtime import plugins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Cancellable, Ended, RepairPlugin, Step

GROUP: Final = "watchdog_agent.repairs"


def start(loop: Loop, step: Step, device: dict[str, str], ended: Ended) -> Plugin:
    """Start it; `ended(ok, reason)` is called once, unless it is cancelled."""
    return Plugin(loop, step, device, ended)


class Plugin:
    """One run of a plugin's step."""

    def __init__(self, loop: Loop, step: Step, device: dict[str, str], ended: Ended) -> None:
        self.running: Cancellable | None = None
        self.guard = plugins.PluginGuard(loop, ended)

        def begin() -> None:
            found: RepairPlugin = plugins.load(GROUP, step["plugin"])
            self.running = found(self.guard, dict(step), dict(device), self.guard.answered)

        self.guard.call(begin)

    def finish_soon(self) -> None:
        """No-op: cannot be sped up."""

    def cancel(self) -> None:
        """Cancel it without a result."""
        try:
            if self.running is not None:
                self.running.cancel()
        except (Exception, SystemExit):
            # Whatever it leaves behind, the agent continues.
            self.running = None
        self.guard.cancel()
