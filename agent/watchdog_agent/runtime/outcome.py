"""The three outcomes of a probe: success, miss, and unable.

A probe that could not be run says nothing about the device: the host's own resolver, route, permissions or
file descriptors failed. It is neither a miss nor a confirmation. Its reason is an `Unable`, which
`of` turns into the outcome; `rated` classifies system errors, for all kinds of probe.
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
"""Errors caused by the device or the network before it. Any other is caused by this host."""


class Unable(str):  # noqa: SLOT000  # slots cannot be added to text
    """A reason why a probe could not be run. Strings derived from it are plain text again."""


class NoRoute(Unable):
    """The reason that this host has no route to the device."""


def rated(error: BaseException, text: str, *, sent: bool = True) -> str:
    """`text`, the description of `error`, as an Unable if this host caused the error.

    `sent`: whether a packet may have left this host. If not, EHOSTUNREACH comes from a reject route; if so,
    no host answered for the address (no ARP or neighbour answer, or a router's message)."""
    if isinstance(error, socket.gaierror):
        return Unable(text)
    if isinstance(error, OSError):
        # A TLS error comes from the peer's answer; its errno is a number of the TLS library.
        if isinstance(error, TimeoutError) or type(error).__module__ == "ssl":
            return text
        if error.errno in _BY_OTHERS and (sent or error.errno != _HOST_UNREACHABLE):
            return text
        if error.errno in _NO_ROUTE:
            return NoRoute(text)
    return Unable(text)


def of(ok: bool | None, reason: str) -> Outcome:  # as in a probe's callback
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
