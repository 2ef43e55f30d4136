"""Runs a program, or restarts a systemd unit: no shell, output discarded; the whole process group is killed on
timeout."""

from __future__ import annotations

import os

from watchdog_agent.runtime import child_guard
from watchdog_agent.runtime.http import reason_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Ended, Step


def start(loop: Loop, step: Step, device: dict[str, str], ended: Ended) -> CommandRun:
    """Start it; `ended(ok, reason)` is called once, unless it is cancelled."""
    if step["kind"] == "unit":
        argv = ["systemctl", "--no-ask-password", "restart", step["unit"]]
    else:
        argv = step["command"]
    return CommandRun(loop, argv, device, ended)


class CommandRun:
    """One program in its own process group."""

    def __init__(self, loop: Loop, argv: list[str], device: dict[str, str], ended: Ended) -> None:
        self.ended: Ended | None = ended
        self.program: child_guard.GuardedProcess | None = None
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        try:
            self.program = child_guard.GuardedProcess(argv, environment(device), null)
        except (OSError, ValueError) as error:
            text = reason_of(error) if isinstance(error, OSError) else str(error)
            loop.later(0, lambda: self._end(False, f"can't be run: {text}"))
            return
        self.program.watch(loop, self._reap)

    def _reap(self) -> None:
        assert self.program is not None
        status = self.program.reap(os.WNOHANG)
        assert status is not None
        code = os.waitstatus_to_exitcode(status)
        self._end(code == 0, f"exit {code}" if code >= 0 else f"ended by signal {-code}")

    def _end(self, ok: bool, reason: str) -> None:
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(ok, reason)

    def finish_soon(self) -> None:
        """No-op: cannot be sped up."""

    def cancel(self) -> None:
        """Kill its process group without a result; the loop reaps it."""
        self.ended = None
        if self.program is not None:
            self.program.kill()


_PRIVATE: Final = ("WATCHDOG_", "CONSUL_", "NOMAD_", "VAULT_")


def environment(device: dict[str, str]) -> dict[str, str]:
    """The agent's environment without private variables (tokens), plus the device's ID and address."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_PRIVATE)}
    return {**inherited, "DEVICE_ID": device["device_id"], "DEVICE_ADDRESS": device["address"]}
