"""Responses of the API server as errors of this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypedDict, cast

from watchdog_agent.runtime.parsing import loads, whole

from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    StaleError,
    TerminalError,
    TransientError,
    UserError,
    WatchdogError,
)


class ExpiredError(StaleError):
    """410: the server no longer has the requested version; list again."""


class FieldConflictError(TerminalError):
    """Another field manager owns a field that should be set."""


class Cause(TypedDict, total=False):
    field: str
    message: str
    reason: str


class StatusDetails(TypedDict, total=False):
    causes: list[Cause] | None


class ErrorStatus(TypedDict, total=False):
    """The Status object of an error response."""

    code: int
    details: StatusDetails | None
    message: str
    reason: str


_PERMANENT: Final[Mapping[int, type[WatchdogError]]] = {
    404: NotFoundError,
    410: ExpiredError,
    400: UserError,
    413: UserError,
    415: UserError,
    422: UserError,
}


def status_of(raw: bytes) -> ErrorStatus:
    """The Status object of a response; empty if it has none."""
    try:
        found = loads(raw)
    except ValueError:
        return {}
    return cast("ErrorStatus", found) if isinstance(found, dict) else {}


def seconds_of(retry_after: str) -> float | None:
    """Value of a Retry-After header; None unless it is a number of seconds up to a day."""
    try:
        return float(whole(retry_after, 0, 86_400))
    except ValueError:
        return None


def translate(status: int, raw: bytes, what: str, retry_after: str = "") -> Exception:
    """The error for a response. `what`: verb and path, so that the message says which right is missing."""
    details = status_of(raw)
    text = str(details.get("message") or raw[:300].decode(errors="replace"))
    message = " ".join(text.split())[:400] or f"HTTP {status}"
    if status == 401:
        return DeniedError(f"kubernetes refuses the credentials ({what})")
    if status == 403:
        # a quota or a namespace that is being deleted; both may change
        if "exceeded quota" in message or "because it is being terminated" in message:
            return TransientError(f"kubernetes: {message}")
        return DeniedError(f"kubernetes: {message}")
    if status == 409:
        return _conflict(details, message)
    if details.get("reason") == "Expired" and status != 404:
        return ExpiredError(f"kubernetes: {message}")
    if kind := _PERMANENT.get(status):
        return kind(f"kubernetes: {message}")
    if status == 429 or status >= 500:
        return TransientError(f"kubernetes: {message}", retry_after_s=seconds_of(retry_after))
    return TerminalError(f"kubernetes answers HTTP {status} to {what}: {message}")


def _conflict(status: ErrorStatus, message: str) -> Exception:
    causes = (status.get("details") or {}).get("causes") or []
    taken = [one for one in causes if one.get("reason") == "FieldManagerConflict"]
    if not taken:
        return ConflictError(f"kubernetes: {message}")
    # the field, and a message such as: conflict with "kubectl" using apps/v1
    words = [f"{one.get('field', '?')}: {one.get('message', '')}" for one in taken[:4]]
    return FieldConflictError(
        f"kubernetes: {'; '.join(words)[:400]}; undo that change, or delete the object"
    )
