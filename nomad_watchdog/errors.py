"""The error tree: whose fault it was, and what to do next.

::

    WatchdogError
    ├─ UserError        bad input, config or template: says what to change; never retried
    │  ├─ NotFoundError no such device, class or placement
    │  ├─ DamagedError  a document in the registry is not what this program writes
    │  ├─ NoRegistryError it was never initialised, or it was wiped
    │  ├─ OutOfDateError an event that is older than what it would change
    │  └─ PreconditionError what is there does not allow it, and trying again will not help
    ├─ TransientError   429, 5xx, time-out, lost connection: try again, carries retry_after_s
    │  └─ StaleError    snapshot partial, or older than our own write: stop nothing (S7, S8)
    ├─ ConflictError    a compare-and-set lost: read again and decide again
    ├─ TerminalError    refused for good: ACL, missing parent, rejected job: counted, shown
    │  ├─ DeniedError   the credentials do not allow it
    │  └─ UnpreparedError what a start needs is missing on the scheduler; `prepare` puts it back
    └─ FencedError      the lease or the epoch is no longer ours: stop acting now (S1, S2)

``exit_code`` follows sysexits(3); ``http_status`` is what the API answers when the error reaches it.
Messages are shown to people: they name what was found and what to do, and never hold a secret (S10).
"""

from __future__ import annotations

from typing import ClassVar

from nomad_watchdog.secret_values import hide


class WatchdogError(Exception):
    """Base of every error that this project raises on purpose. Its message never holds a known secret: what
    a server or a library said is part of many."""

    exit_code: ClassVar[int] = 70
    http_status: ClassVar[int] = 500

    def __init__(self, *args: object) -> None:
        super().__init__(*(hide(arg) if isinstance(arg, str) else arg for arg in args))


class UserError(WatchdogError):
    """The input is wrong; the message says what was found and what is allowed."""

    exit_code = 64
    http_status = 400


class NotFoundError(UserError):
    """The named thing does not exist."""

    exit_code = 66
    http_status = 404


class NoRegistryError(UserError):
    """There is no registry here: it was never initialised, or it was wiped, or this is another store."""


class DamagedError(UserError):
    """A document in the registry is not what this program writes."""


class OutOfDateError(UserError):
    """The event is older than what it would change; sending it again will not help (S5)."""

    http_status = 409


class PreconditionError(UserError):
    """What is there does not allow the request until something else is changed: the device belongs to an
    inventory, the pool is configured. Sending it again will not help."""

    http_status = 409


class TransientError(WatchdogError):
    """Something outside failed for now. ``retry_after_s``: seconds, None when the other side did not say."""

    exit_code = 75
    http_status = 503

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StaleError(TransientError):
    """A read was partial, or older than our own last write: nothing may be decided on it (S7, S8)."""


class ConflictError(WatchdogError):
    """A compare-and-set lost against another writer: read again, decide again."""

    exit_code = 75
    http_status = 409


class TerminalError(WatchdogError):
    """Refused for good: trying again unchanged will not help."""

    exit_code = 69
    http_status = 502


class DeniedError(TerminalError):
    """The credentials that we hold do not allow this."""

    exit_code = 77
    http_status = 502


class UnpreparedError(TerminalError):
    """What every start of a class needs is missing on the scheduler (a parent job that was stopped or
    purged); `Scheduler.prepare` puts it back."""


class FencedError(WatchdogError):
    """The lease or the epoch is no longer ours (S1, S2)."""

    exit_code = 75
    http_status = 410
