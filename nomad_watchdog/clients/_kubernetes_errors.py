"""What the API server's answers mean as our errors."""

from __future__ import annotations

from typing import Any

from watchdog_agent.runtime.parsing import loads, whole

from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    StaleError,
    TerminalError,
    TransientError,
    UserError,
)


class ExpiredError(StaleError):
    """410: the version that was asked for is forgotten; list again."""


class FieldConflictError(TerminalError):
    """Another field manager owns what we would set, and it is not ours to take."""


def status_of(raw: bytes) -> dict[str, Any]:
    """The Status object of an answer; empty when it is none."""
    try:
        found = loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def seconds_of(retry_after: str) -> float | None:
    """Of a Retry-After header; None for one that is no number of seconds below a day."""
    try:
        return float(whole(retry_after, 0, 86_400))
    except ValueError:
        return None


def translate(status: int, raw: bytes, what: str, retry_after: str = "") -> Exception:
    """`what`: verb and path, for a message that says which right is missing."""
    told = status_of(raw)
    text = str(told.get("message") or raw[:300].decode(errors="replace"))
    said = " ".join(text.split())[:400] or f"HTTP {status}"
    reason = told.get("reason") or ""
    after = seconds_of(retry_after)
    if status == 401:
        return DeniedError(f"kubernetes refuses the credentials ({what})")
    if status == 403:
        if "exceeded quota" in said or "because it is being terminated" in said:
            return TransientError(f"kubernetes: {said}")
        return DeniedError(f"kubernetes: {said}")
    if status == 404:
        return NotFoundError(f"kubernetes: {said}")
    if status == 409:
        return _conflict(told, said)
    if status == 410 or reason == "Expired":
        return ExpiredError(f"kubernetes: {said}")
    if status in (400, 413, 415, 422):
        return UserError(f"kubernetes: {said}")
    if status == 429 or status >= 500:
        return TransientError(f"kubernetes: {said}", retry_after_s=after)
    return TerminalError(f"kubernetes answers HTTP {status} to {what}: {said}")


def _conflict(told: dict[str, Any], said: str) -> Exception:
    causes = (told.get("details") or {}).get("causes") or []
    taken = [one for one in causes if one.get("reason") == "FieldManagerConflict"]
    if not taken:
        return ConflictError(f"kubernetes: {said}")
    # "conflict with \"kubectl\" using apps/v1", and the field beside it
    words = [f"{one.get('field', '?')}: {one.get('message', '')}" for one in taken[:4]]
    return FieldConflictError(
        f"kubernetes: {'; '.join(words)[:400]}; undo that change, or delete the object"
    )
