"""How to reach Consul."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from nomad_watchdog import text_files
from nomad_watchdog.clients import hashicorp_environment
from nomad_watchdog.clients._hashicorp_access import HashicorpAccess
from nomad_watchdog.errors import UserError


@dataclass(frozen=True, slots=True)
class ConsulAccess(HashicorpAccess):
    """Address, credentials and TLS settings of Consul."""

    address: str = "http://127.0.0.1:8500"
    timeout_s: float = 10.0
    """Timeout of one call, in addition to the wait time of a blocking query."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **explicit: object) -> ConsulAccess:
        """From Consul's own variables (`hashicorp_environment.CONSUL`, CONSUL_HTTP_SSL, CONSUL_HTTP_TOKEN); `explicit`
        overrides them. Raises UserError for an invalid value."""
        env = os.environ if env is None else env
        settings = cls(
            **hashicorp_environment.settings_with("consul", "CONSUL_HTTP_TOKEN", env, explicit)
        )
        try:
            checked = hashicorp_environment.checked_address(settings.address)
        except ValueError as error:
            raise UserError(f"consul address: {error}") from None
        try:
            return replace(settings, address=hashicorp_environment.secured(checked, env))
        except ValueError as error:
            raise UserError(f"{hashicorp_environment.SSL}: {error}") from None

    def endpoint(self) -> tuple[str, str, int]:
        """Scheme, host and port; the port is the scheme's own when the address names none."""
        host, port = hashicorp_environment.host_and_port(self.address)
        return self.address.partition("://")[0], host, port

    def ssl_context(self) -> ssl.SSLContext | None:
        """None for http. Raises UserError when a certificate cannot be read."""
        return self.context_for("consul", self.address)

    def read_token(self) -> str:
        """The current token. Raises UserError when its file cannot be read."""
        if not self.token_file:
            return self.token
        # As in Consul's CLI the file takes precedence, unless it is empty.
        return text_files.token("consul.token_file", self.token_file) or self.token


NOT_KNOWN: Final = "Consul does not know this token; check consul.token_file (or CONSUL_HTTP_TOKEN)"
"""Message for a token that was deleted, has expired, or belongs to another cluster."""


def is_unknown_token(text: str) -> bool:
    """Whether Consul refuses a token because it does not exist, not because of its rights."""
    return "acl not found" in text.lower()
