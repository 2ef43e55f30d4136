"""How to reach Nomad, and what its answers mean as our errors."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

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
class NomadSettings:
    """Where Nomad is and how to speak to it."""

    address: str = "http://127.0.0.1:4646"
    token: str = field(default="", repr=False)
    token_file: str = ""
    """Read at the first call, and again when Nomad refuses the token."""
    namespace: str = "default"
    region: str = ""
    ca_cert: str = ""
    client_cert: str = ""
    client_key: str = ""
    skip_verify: bool = False
    tls_server_name: str = ""
    timeout_s: float = READ_S

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **explicit: Any) -> NomadSettings:
        """Nomad's own variables; what is given explicitly and is not empty beats them.

        Read are NOMAD_ADDR, NOMAD_TOKEN, NOMAD_TOKEN_FILE, NOMAD_NAMESPACE, NOMAD_REGION,
        NOMAD_CACERT, NOMAD_CLIENT_CERT, NOMAD_CLIENT_KEY, NOMAD_SKIP_VERIFY and
        NOMAD_TLS_SERVER_NAME. Raises UserError for an address that won't do.
        """
        env = os.environ if env is None else env
        named = {
            "address": "NOMAD_ADDR",
            "token": "NOMAD_TOKEN",
            "token_file": "NOMAD_TOKEN_FILE",
            "namespace": "NOMAD_NAMESPACE",
            "region": "NOMAD_REGION",
            "ca_cert": "NOMAD_CACERT",
            "client_cert": "NOMAD_CLIENT_CERT",
            "client_key": "NOMAD_CLIENT_KEY",
            "tls_server_name": "NOMAD_TLS_SERVER_NAME",
        }
        values: dict[str, Any] = {key: env[name] for key, name in named.items() if env.get(name)}
        values["skip_verify"] = env.get("NOMAD_SKIP_VERIFY", "").lower() in {"1", "t", "true"}
        given = {key: value for key, value in explicit.items() if value}
        if {"token", "token_file"} & given.keys():
            values.pop("token", None)
            values.pop("token_file", None)
        settings = cls(**{**values, **given})
        settings.check()
        return settings

    def check(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise UserError("nomad address: allowed is http://host:port or https://host:port")
        if bool(self.client_cert) != bool(self.client_key):
            raise UserError("nomad: client_cert and client_key belong together; one is missing")

    def ssl_context(self) -> ssl.SSLContext:
        """Raises UserError when a certificate can't be read."""
        try:
            context = ssl.create_default_context(cafile=self.ca_cert or None)
            if self.client_cert:
                context.load_cert_chain(self.client_cert, self.client_key)
        except OSError as error:  # ssl.SSLError is one
            raise UserError(f"nomad: can't load the TLS certificates: {error}") from error
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def translate(status: int, text: str, capability: str, retry_after: str = "") -> Exception:
    """Nomad's answer as one of our errors. Almost everything is a 500 with plain text, permanent and
    passing trouble alike, so the text decides."""
    said = " ".join(text.split())[:300] or f"HTTP {status}"
    lower = said.lower()
    if status == 403 or "permission denied" in lower:
        return DeniedError(
            f"nomad refuses the token: {said}; needed is the capability {capability}"
        )
    if status == 404:
        return NotFoundError(f"nomad: {said}")
    if status == 429:
        after = float(retry_after) if retry_after.isdigit() else 1.0
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
