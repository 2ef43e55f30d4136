"""Probes of others: an entry point of the group `watchdog_agent.probes`.

It names a callable `start(loop, settings, address, timeout_s, ended)` that returns at once and calls
`ended(ok, reason)` later, from a callback of the loop. What it raises, then or in any of its callbacks, makes
a failed probe, and so does silence beyond the time-out. Only what blocks the thread can't be fended off.
"""

from __future__ import annotations

from . import checks, plugins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from .loop import Loop
    from .shapes import Ended, Probe

GROUP: Final = "watchdog_agent.probes"


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
    timeout_s = spec["timeout_s"]

    def done(ok: bool, reason: str) -> None:
        timer[2] = None
        ended(ok, reason)

    guard = plugins.Guard(loop, done)
    timer = loop.later(
        timeout_s, lambda: guard.end(False, f"the plugin gave no answer within {timeout_s:g} s")
    )

    def begin() -> None:
        settings = dict(spec["settings"])
        found = plugins.load(GROUP, spec["plugin"])
        found(guard, settings, address, timeout_s, guard.answered)

    guard.call(begin)
