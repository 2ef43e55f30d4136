"""Shapes of values, for type checkers only.

Nobody imports this at run time: `typing` alone would cost every device 0.7 MB (bench/agent.py).
"""

from __future__ import annotations

import io
import socket
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

Config: TypeAlias = dict[str, Any]
"""The configuration document, checked (see `wire`)."""
Probe: TypeAlias = dict[str, Any]
"""One checked probe of it."""
Document: TypeAlias = dict[str, Any]
"""A JSON object that leaves or is kept."""
Timer: TypeAlias = list[Any]
"""[when, sequence, callback or None]: a list, because the heap compares it and cancelling changes it."""
Watched: TypeAlias = socket.socket | io.FileIO
"""What the loop can wait for: a socket, or a pipe or pidfd with a `close` of its own."""
Address: TypeAlias = tuple[str, int]
Outcome: TypeAlias = bool | None
"""Of a probe: True success, False miss, None unable to ask (see `outcome`)."""


class Ended(Protocol):
    """What a probe or a repair step calls at its end: ok, reason. `warning`: the threshold that a success
    exceeds, in words. A reason that is `outcome.Unable` makes a failure of a probe one to ask."""

    def __call__(self, ok: bool, reason: str, warning: str = "", /) -> None: ...


class PluginAnswer(Protocol):
    """What a plugin calls at its end. `ok`: True = success, False = failure, None = unable to probe."""

    def __call__(self, ok: bool | None, reason: str = "", /) -> None: ...


class PluginLoop(Protocol):
    """The loop as plugins see it. An exception in a callback ends the plugin, not the agent."""

    def later(self, delay_s: float, callback: Callable[[], None], /) -> Timer:
        """Call `callback` after this time."""
        ...

    def watch(self, sock: Watched, events: int, callback: Callable[[int], None], /) -> None:
        """Call `callback` with the events whenever the socket has any of them."""
        ...

    def forget(self, sock: Watched, /) -> None:
        """Stop watching the socket, and close it."""
        ...


class Cancellable(Protocol):
    """A repair step in progress."""

    def cancel(self) -> object:
        """Give up; `ended` is not called any more."""
        ...


class ProbePlugin(Protocol):
    """An entry point of the group `watchdog_agent.probes`: returns at once, and calls `ended` later."""

    def __call__(
        self,
        loop: PluginLoop,
        settings: dict[str, object],
        address: str,
        timeout_s: float,
        ended: PluginAnswer,
        /,
    ) -> object: ...


class RepairPlugin(Protocol):
    """An entry point of the group `watchdog_agent.repairs`: returns at once, and calls `ended` once."""

    def __call__(
        self,
        loop: PluginLoop,
        step: dict[str, object],
        device: dict[str, object],
        ended: PluginAnswer,
        /,
    ) -> Cancellable | None: ...


Probed: TypeAlias = Callable[[Outcome, str, float, str], None]
"""outcome, reason, seconds taken, warning"""
Fetched: TypeAlias = Callable[[int | None, dict[str, str], Any], None]
"""status, headers, body bytes; or None, {}, the reason as text"""
Answer: TypeAlias = tuple[int, str, bytes]
"""status, content type, body"""
Log: TypeAlias = Callable[[str], None]
Step: TypeAlias = dict[str, Any]
"""One checked step of `repairs`, with its `id` and `name`."""
Decision: TypeAlias = tuple[str, Step | None, float | None, str]
"""what, the step, when to look again, why"""
