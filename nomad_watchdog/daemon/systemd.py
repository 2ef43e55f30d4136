"""Notifications to systemd (sd_notify(3)). They do nothing without NOTIFY_SOCKET."""

from __future__ import annotations

import logging
import os
import socket

from watchdog_agent.runtime.parsing import whole

log = logging.getLogger(__name__)


def ready() -> bool:
    """Start-up is finished."""
    return notify("READY=1")


def reloading(now: float) -> bool:
    """A reload of the configuration has begun; `ready` ends it. `now`: monotonic seconds."""
    return notify(f"RELOADING=1\nMONOTONIC_USEC={int(now * 1e6)}")


def stopping() -> bool:
    """Shutdown has begun."""
    return notify("STOPPING=1")


def watchdog() -> bool:
    """The process is alive. Call it at least once per WATCHDOG_USEC."""
    return notify("WATCHDOG=1")


def watchdog_interval_s() -> float | None:
    """Interval for `watchdog`, seconds: half of WATCHDOG_USEC (sd_watchdog_enabled(3)); None if systemd expects no
    calls from this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return whole(os.environ.get("WATCHDOG_USEC", ""), 1) / 2_000_000
    except ValueError:
        return None


def notify(state: str) -> bool:
    """Send one state; False if there is no receiver. A name that begins with @ is an abstract socket."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A full queue must not block the event loop.
            sender.setblocking(False)
            sender.sendto(state.encode(), address)
    except OSError as error:
        log.warning("sd_notify failed", extra={"reason": str(error)})
        return False
    return True
