"""The modules of the repair kinds, and how a step is undone."""

from __future__ import annotations

import os

from watchdog_agent.runtime.http import reason_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from watchdog_agent.runtime.types import Undo


def recover(saved: Any, log: Callable[..., None]) -> None:
    """Undo what a step left behind, for an agent whose class has no repairs any more."""
    try:
        if saved["undo"] is not None:
            undo(saved["undo"])
            log("an interrupted repair is undone")
    except OSError as error:
        log("an interrupted repair can't be undone", reason=reason_of(error))
    except (KeyError, TypeError, ValueError, AttributeError):
        log("kept repairs can't be used")


def undo(left: Undo) -> None:
    """Undo what a step left behind. Raises OSError, and KeyError for an unknown record."""
    if left.get("kind") == "interface":
        from watchdog_agent.repairs import interface

        interface.restore(left)


def module_of(kind: str) -> Any:
    """The module of a step kind, loaded when the first step is taken."""
    if kind == "interface":
        from watchdog_agent.repairs import interface as module
    elif kind == "http":
        from watchdog_agent.repairs import http as module  # type: ignore[no-redef]  # one of several
    elif kind == "mqtt":
        from watchdog_agent.repairs import mqtt as module  # type: ignore[no-redef]  # as above
    elif kind == "wake":
        from watchdog_agent.repairs import wake_on_lan as module  # type: ignore[no-redef]  # as above
    elif kind == "plugin":
        from watchdog_agent.repairs import plugin as module  # type: ignore[no-redef]  # as above
    else:
        from watchdog_agent.repairs import command as module  # type: ignore[no-redef]  # as above
    return module


def reached(point: str) -> None:
    """Kill this process here if the environment names this point; for tests."""
    if os.environ.get("WATCHDOG_FAILPOINT") == f"repairs.{point}:kill":
        os.kill(os.getpid(), 9)
