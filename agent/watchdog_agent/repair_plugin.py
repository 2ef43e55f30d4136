"""A step that somebody else wrote: an entry point of the group `watchdog_agent.repairs`.

It names a callable `start(loop, step, device, ended)`: it must not block, calls `ended(ok, reason)` once,
and gives an object with `cancel()`, or None. What it raises is a failed step.
"""

from __future__ import annotations

from . import plugins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from .loop import Loop
    from .shapes import Document, Ended, Step

GROUP: Final = "watchdog_agent.repairs"


def start(loop: Loop, step: Step, device: Document, ended: Ended) -> Plugin:
    """Begin; `ended(ok, reason)` is called once, unless it is cancelled."""
    return Plugin(loop, step, device, ended)


class Plugin:
    """One run of a plugin's step."""

    def __init__(self, loop: Loop, step: Step, device: Document, ended: Ended) -> None:
        self.running: Any = None
        self.ended: Ended | None = ended
        try:
            self.running = plugins.load(GROUP, step["plugin"])(
                loop, dict(step), dict(device), self._end
            )
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:200]
            loop.later(0, lambda: self._end(False, text))

    def _end(self, ok: bool, reason: str) -> None:
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(ok is True, str(reason))

    def hurry(self) -> None:
        """It is as fast as it can be."""

    def cancel(self) -> None:
        """Give up; nobody is told."""
        self.ended = None
        try:
            if self.running is not None:
                self.running.cancel()
        except Exception:
            # Whatever it leaves behind, the agent goes on.
            self.running = None
