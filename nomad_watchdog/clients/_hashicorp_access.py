"""Settings that the clients of Nomad and Consul have in common."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field

from nomad_watchdog.clients import hashicorp_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class HashicorpAccess:
    """Token and TLS settings. `token_file` is read again when the server refuses the token."""

    token: str = field(default="", repr=False)
    token_file: str = ""
    namespace: str = ""
    ca_cert: str = ""
    ca_path: str = ""
    client_cert: str = ""
    client_key: str = ""
    tls_skip_verify: bool = False
    tls_server_name: str = ""

    def context_for(self, block: str, address: str) -> ssl.SSLContext | None:
        """The TLS context for an address; None for http. `block`: of the settings, for errors. Raises UserError when
        a certificate cannot be read."""
        if not address.startswith("https://"):
            return None
        return hashicorp_environment.trust(
            block,
            ca_cert=self.ca_cert,
            ca_path=self.ca_path,
            client_cert=self.client_cert,
            client_key=self.client_key,
            skip_verify=self.tls_skip_verify,
        )
