"""Named steps at which the program can be made to die, to prove that a crash there loses nothing (L2).

``NOMAD_WATCHDOG_FAILPOINT=K5:kill`` sends this process SIGKILL the first time that it gets to K5, and
``K5:kill@3`` the third time. Without the variable a step costs one comparison and nothing can be armed:
there is no setting, no flag and no call of the API for it.
"""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.errors import UserError

log = logging.getLogger(__name__)

VARIABLE: Final = "NOMAD_WATCHDOG_FAILPOINT"
POINTS: Final[Mapping[str, str]] = {
    "K1": "a wish was read, and nothing is done yet",
    "K2": "the wish is in the registry",
    "K3": "the wish is acknowledged",
    "K4": "actions are decided and taken from the queue",
    "K5": "the epochs of a batch are in the registry",
    "K6": "the scheduler is about to be asked for a start",
    "K7": "the scheduler has answered, and nothing remembers it",
    "K8": "the start is remembered",
    "K9": "a changed verdict is an event",
    "K10": "an older placement was told to stop",
}
_FORM: Final = re.compile(r"(K\d+):kill(?:@([1-9]\d{0,5}))?")


@dataclass(slots=True)
class _Trap:
    point: str = ""
    left: int = 0
    """So many more visits, the last of which kills."""


_trap: Final = _Trap()


def arm(environment: Mapping[str, str]) -> None:
    """Set the trap that the environment names, if any. Raises UserError for one that is not known."""
    text = environment.get(VARIABLE, "")
    _trap.point = ""
    if not text:
        return
    found = _FORM.fullmatch(text)
    if found is None or found[1] not in POINTS:
        raise UserError(
            f"{VARIABLE} is {ascii(text)[:40]}; allowed is POINT:kill or POINT:kill@N, where POINT is "
            f"one of {', '.join(POINTS)}"
        )
    _trap.point, _trap.left = found[1], int(found[2] or 1)
    log.warning(
        "this process is armed to kill itself: for tests only",
        extra={"reason": f"{VARIABLE}={text}: {POINTS[_trap.point]}"},
    )


def armed() -> str:
    """The point at which this process will die; "" = none, as always outside tests."""
    return _trap.point


def reached(point: str) -> None:
    """Say that a step has been taken."""
    if point != _trap.point:
        return
    _trap.left -= 1
    if _trap.left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
