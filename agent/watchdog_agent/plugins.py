"""Where plugins are found: entry points of what is installed beside this Python.

An agent that was started with -S has not looked for packages, which is lighter. It does when the first plugin
is asked for and is not there.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def load(group: str, name: str) -> Any:
    """The object that an entry point names. Raises LookupError, or what its module raises."""
    from importlib import metadata

    found = metadata.entry_points(group=group)
    if name not in found.names and "site" not in sys.modules:
        import site

        site.main()
        found = metadata.entry_points(group=group)
    if name not in found.names:
        names = ", ".join(sorted(found.names)) or "none"
        raise LookupError(f"no plugin {name} is installed; installed: {names}")
    return found[name].load()
