"""Third-party probes: entry points of the group `watchdog_agent.probes`.

An entry point names a callable `start(loop, settings, address, timeout_s, ended)` that returns at once and calls
`ended(ok, reason)` later, from a callback of the loop; `ok` is True, False, or None if the probe could not be run.
An exception from it or from any of its callbacks ends the probe as unable, unless it is an error caused by the
device or the network, such as ConnectionRefusedError or TimeoutError. No result within the timeout is a miss.
Only a plugin that blocks the thread cannot be contained.
"""

from __future__ import annotations

from watchdog_agent import errors
from watchdog_agent.config import optional_table, validators
from watchdog_agent.runtime import plugins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Document, Ended, Probe, ProbePlugin

GROUP: Final = "watchdog_agent.probes"


def check(probe: Document, where: str) -> None:
    """Check the settings. Raises ConfigError. A plugin that is not installed makes the probe unable at run time."""
    validators.require(probe, "plugin", optional_table.PLUGIN, where)
    settings = probe.setdefault("settings", {})
    if not isinstance(settings, dict) or len(settings) > 64:
        raise errors.ConfigError(f"{where}: settings must be an object of at most 64")


def start(loop: Loop, spec: Probe, address: str, ended: Ended) -> None:
    """Start the plugin in a guard."""
    timeout_s = spec["timeout_s"]

    def done(ok: bool, reason: str, _warning: str = "") -> None:
        timer[2] = None
        ended(ok, reason)

    guard = plugins.PluginGuard(loop, done)
    timer = loop.later(
        timeout_s, lambda: guard.end(False, f"the plugin gave no answer within {timeout_s:g} s")
    )

    def begin() -> None:
        settings = dict(spec["settings"])
        found: ProbePlugin = plugins.load(GROUP, spec["plugin"])
        found(guard, settings, address, timeout_s, guard.answered)

    guard.call(begin)
