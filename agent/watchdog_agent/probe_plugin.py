"""Probes of others: an entry point of the group `watchdog_agent.probes`.

It names a callable `start(loop, settings, address, timeout_s, ended)` that returns at once and calls
`ended(ok, reason)` later, from a callback of the loop. What it raises, then or in any of its callbacks, makes
a failed probe, and so does silence beyond the time-out. Only what blocks the thread can't be fended off.
"""

from __future__ import annotations

from . import checks, plugins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop
    from .shapes import Ended, Probe, Timer

GROUP = "watchdog_agent.probes"
_loaded: dict[str, Any] = {}


def check(probe: Probe, where: str) -> None:
    """Raises ConfigError. That it is installed is seen when it runs: a missing plugin is a failed probe."""
    checks.text(probe, "plugin", "", 128)
    if not probe["plugin"]:
        raise checks.ConfigError(f"{where}: plugin needs plugin, the name of an entry point")
    settings = probe.setdefault("settings", {})
    if not isinstance(settings, dict) or len(settings) > 64:
        raise checks.ConfigError(f"{where}: settings must be an object of at most 64")


def start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Start it behind a guard."""
    guard = _Guard(loop, spec["timeout_s"], ended)

    def begin() -> None:
        settings = dict(spec["settings"])
        load(spec["plugin"])(guard, settings, address, spec["timeout_s"], guard.answered)

    guard.call(begin)


def load(name: str) -> Any:
    """The callable of this name. Raises LookupError, or what its module raises."""
    if name not in _loaded:
        _loaded[name] = plugins.load(GROUP, name)
    return _loaded[name]


class _Guard:
    """In the loop's place for a plugin: what its callbacks raise ends its probe, not the agent."""

    def __init__(self, loop: Loop, timeout_s: float, ended: Ended) -> None:
        self.loop = loop
        self.ended: Ended | None = ended
        self.open: list[Any] = []
        self.timer = loop.later(
            timeout_s, lambda: self._end(False, f"the plugin gave no answer within {timeout_s:g} s")
        )

    def call(self, callback: Callable[..., None], *given: int) -> None:
        """Call it; an error is a failed probe."""
        if self.ended is None:
            return
        try:
            callback(*given)
        except (Exception, SystemExit) as error:
            text = f"the plugin failed: {type(error).__name__}: {error}"
            self.loop.later(0, lambda: self._end(False, text))

    def later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """As Loop.later."""
        return self.loop.later(delay_s, lambda: self.call(callback))

    def watch(self, sock: Any, events: int, callback: Callable[[int], None]) -> None:
        """As Loop.watch; what is still watched when the probe ends is closed."""
        if sock not in self.open:
            self.open.append(sock)
        self.loop.watch(sock, events, lambda mask: self.call(callback, mask))

    def forget(self, sock: Any) -> None:
        """As Loop.forget."""
        if sock in self.open:
            self.open.remove(sock)
        self.loop.forget(sock)

    def answered(self, ok: object, reason: object = "") -> None:
        """What the plugin calls; once counts."""
        text = "".join(c if c.isprintable() else "?" for c in str(reason)[:200])
        self.loop.later(0, lambda: self._end(ok is True, text or "the plugin gave no reason"))

    def _end(self, ok: bool, reason: str) -> None:
        ended, self.ended = self.ended, None
        self.timer[2] = None
        for sock in self.open:
            self.loop.forget(sock)
        self.open.clear()
        if ended is not None:
            ended(ok, reason)
