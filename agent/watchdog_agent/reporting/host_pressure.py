"""The pressure of the agent's host, as the kernel measures it (pressure stall information, Linux 4.20 and later).

https://docs.kernel.org/accounting/psi.html. Imported only when the control plane asks for it.
"""

from __future__ import annotations

import os

from watchdog_agent.runtime import parsing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from watchdog_agent.wire import HostPressure, Stall

    Resource = Literal["cpu", "memory", "io"]

FOLDER = "/proc/pressure"
RESOURCES: tuple[Resource, ...] = ("cpu", "memory", "io")
_MAX_BYTES = 512
"""The kernel writes two lines of about 60 bytes."""


def read(folder: str = FOLDER) -> HostPressure:
    """Read the line `some` of each resource. A resource that cannot be read is missing, and `unreadable` states why."""
    found: HostPressure = {}
    for resource in RESOURCES:
        path = f"{folder}/{resource}"
        try:
            found[resource] = _some(_text(path))
        except OSError as error:  # no such file, no permission, or psi=0
            found["unreadable"] = f"{path}: {os.strerror(error.errno or 0)}"
        except ValueError as error:
            found["unreadable"] = f"{path}: {error}"
    return found


def _text(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _MAX_BYTES).decode("ascii", "replace")
    finally:
        os.close(descriptor)


def _some(text: str) -> Stall:
    """Parse "some avg10=1.50 avg60=0.80 avg300=0.10 total=1234". Raises ValueError."""
    for line in text.splitlines():
        kind, *pairs = line.split()
        if kind == "some":
            values = dict(pair.partition("=")[::2] for pair in pairs)
            return {"avg10": _percent(values, "avg10"), "avg60": _percent(values, "avg60")}
    raise ValueError("there is no line that begins with some")


def _percent(values: dict[str, str], name: str) -> float:
    number = parsing.finite(values.get(name, ""))
    if not 0 <= number <= 100:
        raise ValueError(f"{name} is not from 0 to 100")
    return number
