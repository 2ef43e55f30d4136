"""A step of a plugin: an entry point of the group `watchdog_agent.repairs`.

It names a callable `start(loop, step, device, ended)`: it must not block, calls `ended(ok, reason)` once,
and gives an object with `cancel()`, or None. What it raises, then or in any of its callbacks, makes a failed
step.
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
    """Begin; `ended(ok, reason)` is called once, unless it is cancelled."""
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
        """Nothing can make it faster."""

    def cancel(self) -> None:
        """Cancel it without a result."""
        try:
            if self.running is not None:
                self.running.cancel()
        except (Exception, SystemExit):
            # Whatever it leaves behind, the agent goes on.
            self.running = None
        self.guard.cancel()
