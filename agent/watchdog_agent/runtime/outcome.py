"""The three outcomes of a probe: success, miss, and unable to ask.

A probe that the agent could not ask says nothing about the device: its own resolver, route, permissions or
file descriptors failed. It is neither a miss nor a confirmation. Such a reason is an `Unable`, and
`probes.start` makes the outcome of it; `rated` has the rule for errors of the system, for all kinds of probe.
"""

from __future__ import annotations

from watchdog_agent.runtime.stdlib_light import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from watchdog_agent.runtime.status_types import ProbeResult
    from watchdog_agent.runtime.types import Outcome

SUCCESS: Final = True
MISS: Final = False
UNABLE: Final = None
_HOST_UNREACHABLE: Final = 113
_NO_ROUTE: Final = frozenset((100, 101, _HOST_UNREACHABLE))
"""ENETDOWN, ENETUNREACH, EHOSTUNREACH"""
# EPIPE, ECONNABORTED, ECONNRESET, ETIMEDOUT, ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH
_BY_OTHERS: Final = frozenset((32, 103, 104, 110, 111, 112, _HOST_UNREACHABLE))
"""Errors that the device or the network before it causes. Any other is this host's own."""


class Unable(str):  # noqa: SLOT000  # slots cannot be added to text
    """A reason why the agent was unable to ask. Text made of it is plain text again."""


class NoRoute(Unable):
    """The reason is that this host has no route to the device."""


def rated(error: BaseException, text: str, *, sent: bool = True) -> str:
    """`text`, which describes `error`, as an Unable if the error is this host's own.

    `sent`: whether a packet may have left this host. Without one EHOSTUNREACH is a route that rejects; after
    one it means that no host answered for the address (no ARP or neighbour answer, or a router's word)."""
    if isinstance(error, socket.gaierror):
        return Unable(text)
    if isinstance(error, OSError):
        # An error of TLS comes from the other side's answer; its number is the library's own.
        if isinstance(error, TimeoutError) or type(error).__module__ == "ssl":
            return text
        if error.errno in _BY_OTHERS and (sent or error.errno != _HOST_UNREACHABLE):
            return text
        if error.errno in _NO_ROUTE:
            return NoRoute(text)
    return Unable(text)


def of(ok: bool | None, reason: str) -> Outcome:  # as a probe's callback has it
    """The outcome of a probe that ended with `ok` and this reason."""
    if ok:
        return SUCCESS
    return UNABLE if ok is None or isinstance(reason, Unable) else MISS


def result_json(outcome: Outcome, reason: str, took_s: float, warning: str) -> ProbeResult:
    """One result for /status; `ok` is true for a success only."""
    word = "success" if outcome else "unable" if outcome is None else "miss"
    result: ProbeResult = {
        "ok": bool(outcome),
        "outcome": word,
        "reason": reason,
        "took_s": took_s,
    }
    if warning:
        result["warning"] = warning
    return result
