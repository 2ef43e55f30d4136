"""How to reach Nomad, and its error responses as errors of this project."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from watchdog_agent.runtime.parsing import whole

from nomad_watchdog import text_files
from nomad_watchdog.clients import hashicorp_environment
from nomad_watchdog.clients._hashicorp_access import HashicorpAccess
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    TerminalError,
    TransientError,
    UserError,
    WatchdogError,
)

READ_S: Final = 15.0
"""Longer than the 5.2 s after which a server without a leader answers a request."""

_TERMINAL: Final = (
    "parameterized job not found",
    "is stopped",
    "is not a parameterized job",
    "can't dispatch",
    "read-only",
    "cannot update",
)
_USER: Final = (
    "validation failed",
    "validation error",
    "errors occurred",
    "error occurred",
    "dispatch did not provide",
    "dispatch request included",
    "payload",
    "missing required",
)


@dataclass(frozen=True, slots=True)
class NomadAccess(HashicorpAccess):
    """Address, credentials and TLS settings of Nomad. `token_file` takes precedence over `token`."""

    address: str = "http://127.0.0.1:4646"
    namespace: str = "default"
    region: str = ""
    timeout_s: float = READ_S

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **explicit: object) -> NomadAccess:
        """From Nomad's own variables (`hashicorp_environment.NOMAD` and NOMAD_TOKEN); `explicit` overrides them.

        Raises UserError for an invalid value."""
        env = os.environ if env is None else env
        values = hashicorp_environment.settings_with("nomad", "NOMAD_TOKEN", env, explicit)
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raises UserError for an invalid address or combination."""
        try:
            hashicorp_environment.checked_address(self.address)
        except ValueError as error:
            raise UserError(f"nomad address: {error}") from None
        if bool(self.client_cert) != bool(self.client_key):
            raise UserError("nomad: set both client_cert and client_key, or neither")

    def read_token(self) -> str:
        """The current token. Raises UserError when its file cannot be read."""
        return (
            text_files.token("nomad.token_file", self.token_file) if self.token_file else self.token
        )

    def ssl_context(self) -> ssl.SSLContext | None:
        """None for http. Raises UserError when a certificate cannot be read."""
        return self.context_for("nomad", self.address)


NOT_KNOWN: Final = "Nomad does not know this token; check nomad.token_file (or NOMAD_TOKEN)"
"""Message for a token that was deleted, has expired, or belongs to another cluster."""

_NO_SUCH_TOKEN: Final = (
    "acl token not found",
    "acl token expired",
    "acl token lookup failed",  # for a text that cannot be a token
)


def is_unknown_token(text: str) -> bool:
    """Whether Nomad refuses a token because it does not exist, not because of its rights. Most calls only report
    a denial; `/v1/acl/token/self` and the calls of the agent report this (measured on Nomad 1.6.3)."""
    lower = text.lower()
    return any(one in lower for one in _NO_SUCH_TOKEN)


def translate(status: int, text: str, capability: str, retry_after: str = "") -> Exception:
    """The error for a response. Nomad uses status 500 with plain text for nearly all errors, permanent and
    temporary ones, so the text decides. `capability`: the one that the call needs."""
    message = " ".join(text.split())[:300] or f"HTTP {status}"
    if is_unknown_token(message):
        return DeniedError(NOT_KNOWN)
    if status == 403 or "permission denied" in message.lower():
        return DeniedError(
            f"nomad refuses the token: {message}; it needs the capability {capability}"
        )
    if status == 404:
        return NotFoundError(f"nomad: {message}")
    if status == 429:
        return TransientError(
            f"nomad has too many connections from this address: {message}",
            retry_after_s=_seconds(retry_after),
        )
    if kind := _kind_of(status, message.lower()):
        return kind(f"nomad: {message}")
    return TerminalError(f"nomad answers HTTP {status}: {message}")


def _kind_of(status: int, lower: str) -> type[WatchdogError] | None:
    """The kind of error, by its text in lower case; None for an unknown one below status 500."""
    if "enforcing job modify index" in lower:
        return ConflictError
    if any(one in lower for one in _TERMINAL):
        return TerminalError
    if status in (400, 413) or (status == 500 and any(one in lower for one in _USER)):
        return UserError
    return TransientError if status >= 500 else None


def _seconds(retry_after: str) -> float:
    """Value of a Retry-After header; 1 s unless it is a number of seconds up to a day."""
    try:
        return float(whole(retry_after, 0, 86_400))
    except ValueError:
        return 1.0
