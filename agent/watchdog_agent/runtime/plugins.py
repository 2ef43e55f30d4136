"""Finds plugins, which are entry points of packages installed in this Python, and guards the agent against
their errors.

An agent that was started with -S has not set up site-packages, which saves memory. It does so when the first
requested plugin is not found.
"""

from __future__ import annotations

import sys
import time

from watchdog_agent.runtime.outcome import Unable, rated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Ended, Timer, Watched

AGAIN_S: Final = 60.0
"""Retry interval for a missing plugin, in seconds: a search reads all installed packages."""

_points: dict[tuple[str, str], Any] = {}
_missing: dict[tuple[str, str], tuple[float, str]] = {}
"""Time until which a plugin counts as missing, and the error."""


def load(group: str, name: str) -> Any:
    """Load the object of an entry point. Raises LookupError, or any error of its module."""
    key = (group, name)
    until, text = _missing.get(key, (0.0, ""))
    if time.monotonic() < until:
        raise LookupError(text)
    if key not in _points:
        try:
            _points[key] = _find(group, name)
        except LookupError as error:
            _missing[key] = (time.monotonic() + AGAIN_S, str(error))
            raise
    return _points[key].load()


def _find(group: str, name: str) -> Any:
    from importlib import metadata

    found = metadata.entry_points(group=group)
    if name not in found.names and "site" not in sys.modules:
        import site

        site.main()
        found = metadata.entry_points(group=group)
    if name not in found.names:
        names = ", ".join(sorted(found.names)) or "none"
        raise LookupError(f"no plugin {name} is installed; installed: {names}")
    return found[name]


class PluginGuard:
    """A loop for one plugin: an exception in its callbacks ends its run, not the agent. After the end
    no callback is called, and all sockets it watched are closed."""

    def __init__(self, loop: Loop, ended: Ended) -> None:
        self.loop = loop
        self.ended: Ended | None = ended
        self.open: list[Watched] = []

    def call(self, callback: Callable[..., None], *given: int) -> None:
        """Call it; an exception is a failure."""
        if self.ended is None:
            return
        try:
            callback(*given)
        except (Exception, SystemExit) as error:
            text = f"the plugin failed: {type(error).__name__}: {error}"
            # Only an error that the device or the network causes is evidence about the device.
            self.answered(None if isinstance(rated(error, text), Unable) else False, text)

    def later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Like Loop.later."""
        return self.loop.later(delay_s, lambda: self.call(callback))

    def watch(self, sock: Watched, events: int, callback: Callable[[int], None]) -> None:
        """Like Loop.watch; sockets still watched at the end are closed."""
        if sock not in self.open:
            self.open.append(sock)
        self.loop.watch(sock, events, lambda mask: self.call(callback, mask))

    def forget(self, sock: Watched) -> None:
        """Like Loop.forget."""
        if sock in self.open:
            self.open.remove(sock)
        self.loop.forget(sock)

    def answered(self, ok: object, reason: object = "") -> None:
        """The callback of the plugin, which may be called before its `start` returns; only the first call counts. `ok`:
        True = success, None = unable, anything else = failure."""
        text = "".join(c if c.isprintable() else "?" for c in str(reason)[:200])
        text = text or "the plugin gave no reason"
        shown = Unable(text) if ok is None else text
        self.loop.later(0, lambda: self.end(ok is True, shown))

    def end(self, ok: bool, reason: str) -> None:
        """Report the result, unless the run has already ended."""
        ended = self.ended
        self.cancel()
        if ended is not None:
            ended(ok, reason)

    def cancel(self) -> None:
        """End the run without a result."""
        self.ended = None
        for sock in self.open:
            self.loop.forget(sock)
        self.open.clear()
