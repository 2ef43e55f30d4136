"""How to reach Nomad, and what its answers mean as our errors."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from watchdog_agent.runtime.parsing import whole

from nomad_watchdog import text_files
from nomad_watchdog.clients import hashicorp_environment
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    TerminalError,
    TransientError,
    UserError,
)

READ_S: Final = 15.0
"""Above the 5.2 s that a server without a leader holds a request."""

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
class NomadAccess:
    """Where Nomad is and how to speak to it."""

    address: str = "http://127.0.0.1:4646"
    token: str = field(default="", repr=False)
    token_file: str = ""
    """Read at the first call, and again when Nomad refuses the token. Takes precedence over `token`."""
    namespace: str = "default"
    region: str = ""
    ca_cert: str = ""
    ca_path: str = ""
    client_cert: str = ""
    client_key: str = ""
    tls_skip_verify: bool = False
    tls_server_name: str = ""
    timeout_s: float = READ_S

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **explicit: Any) -> NomadAccess:
        """Nomad's own variables (`hashicorp.NOMAD` and NOMAD_TOKEN); what is given explicitly beats them.

        Raises UserError for a value that won't do."""
        env = os.environ if env is None else env
        settings = cls(**hashicorp_environment.settings_with("nomad", "NOMAD_TOKEN", env, explicit))
        settings.check()
        return settings

    def check(self) -> None:
        """Raises UserError for an address or a combination that won't do."""
        try:
            hashicorp_environment.checked_address(self.address)
        except ValueError as error:
            raise UserError(f"nomad address: {error}") from None
        if bool(self.client_cert) != bool(self.client_key):
            raise UserError("nomad: client_cert and client_key belong together; one is missing")

    def read_token(self) -> str:
        """The token now. Raises UserError when its file can't be read."""
        return (
            text_files.token("nomad.token_file", self.token_file) if self.token_file else self.token
        )

    def ssl_context(self) -> ssl.SSLContext | None:
        """None over http. Raises UserError when a certificate can't be read."""
        if not self.address.startswith("https://"):
            return None
        return hashicorp_environment.trust(
            "nomad",
            ca_cert=self.ca_cert,
            ca_path=self.ca_path,
            client_cert=self.client_cert,
            client_key=self.client_key,
            skip_verify=self.tls_skip_verify,
        )


NOT_KNOWN: Final = "Nomad does not know this token; check nomad.token_file (or NOMAD_TOKEN)"
"""Of a token that was deleted, that has expired, or that is of another cluster."""


_NO_SUCH_TOKEN: Final = (
    "acl token not found",
    "acl token expired",
    "acl token lookup failed",  # not of a token's form
)


def is_unknown_token(said: str) -> bool:
    """Whether Nomad refuses a token because there is none of its name, whatever its rights were. Most calls are only
    denied then; `/v1/acl/token/self` and calls of the agent say so (measured on Nomad 1.6.3)."""
    lower = said.lower()
    return any(one in lower for one in _NO_SUCH_TOKEN)


def translate(status: int, text: str, capability: str, retry_after: str = "") -> Exception:
    """Nomad's answer as one of our errors. Almost everything is a 500 with plain text, permanent and
    passing trouble alike, so the text decides."""
    said = " ".join(text.split())[:300] or f"HTTP {status}"
    lower = said.lower()
    if is_unknown_token(said):
        return DeniedError(NOT_KNOWN)
    if status == 403 or "permission denied" in lower:
        return DeniedError(
            f"nomad refuses the token: {said}; needed is the capability {capability}"
        )
    if status == 404:
        return NotFoundError(f"nomad: {said}")
    if status == 429:
        try:
            after = float(whole(retry_after, 0, 86_400))
        except ValueError:
            after = 1.0
        return TransientError(
            f"nomad has too many connections from here: {said}", retry_after_s=after
        )
    if "enforcing job modify index" in lower:
        return ConflictError(f"nomad: {said}")
    if any(one in lower for one in _TERMINAL):
        return TerminalError(f"nomad: {said}")
    if status in (400, 413) or (status == 500 and any(one in lower for one in _USER)):
        return UserError(f"nomad: {said}")
    if status >= 500:
        return TransientError(f"nomad: {said}")
    return TerminalError(f"nomad answers HTTP {status}: {said}")
