"""Settings of the API: addresses, authentication, rate limits and TLS."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from nomad_watchdog.config.types import (
    Block,
    Host,
    Name,
    Positive,
    Size,
    Text,
    Url,
    checked_listen,
)

LabelText = Annotated[str, Field(min_length=1, max_length=128)]


class TokenSettings(Block):
    """A token in addition to the operator token. `core.roles` defines what each role may do."""

    role: Literal["viewer", "device", "agent", "operator"]
    file: Text
    id_prefix: Annotated[str, Field(max_length=128)] = ""
    labels: dict[LabelText, LabelText] = Field(default_factory=dict, max_length=32)
    max_devices: Annotated[int, Field(ge=1, le=1_000_000)] = 20_000


class ApiSettings(Block):
    listen: Annotated[str, AfterValidator(checked_listen)] = "127.0.0.1:9670"
    advertise: Url | None = None
    own_address: Url | None = None
    token_file: Text | None = None
    token: dict[Name, TokenSettings] = Field(default_factory=dict)
    open: bool = False
    agent_key_file: Text | None = None
    webhook_secrets_file: Text | None = None
    tls_cert: Text | None = None
    tls_key: Text | None = None
    client_ca: Text | None = None
    ca_cert: Text | None = None
    rate: Annotated[float, Field(gt=0, le=1_000_000)] = 1_000.0
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    read_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    read_burst: Positive = 2.0
    streams_per_token: Annotated[int, Field(ge=1, le=64)] = 8
    max_body: Size = 1024 * 1024
    hosts: Annotated[tuple[Host, ...], Field(max_length=64)] = ()
    max_connections: Annotated[int, Field(ge=16, le=1_000_000)] = 4096
    max_connections_per_address: Annotated[int, Field(ge=8, le=1_000_000)] = 3072
    unauthenticated_rate: Annotated[float, Field(gt=0, le=1_000_000)] = 500.0

    @property
    def secure(self) -> bool:
        """Whether the API uses TLS."""
        return self.tls_cert is not None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the API."""
        host = self.listen.rpartition(":")[0].strip("[]")
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def guarded(self) -> bool:
        """Whether the API requires a token."""
        return self.token_file is not None or bool(self.token)

    @property
    def agent_token_file(self) -> str | None:
        """File of the operator token, which agents use; None if each agent has its own credential."""
        return None if self.agent_key_file else self.token_file

    def misfits(self) -> Iterator[tuple[str, str]]:
        """(setting, error) for each contradiction between settings."""
        yield from self._tls_misfits()
        if not self.loopback and not self.guarded and not self.open:
            text = f"{self.listen} can be reached from other machines, and no token is asked for; "
            fix = "name one in api.token_file, listen on 127.0.0.1, or set  open = true"
            yield "listen", text + fix
        if self.open and self.guarded:
            yield "open", "open = true and a token exclude each other"
        for name, token in self.token.items():
            for limit in ("id_prefix", "labels", "max_devices"):
                if limit in token.model_fields_set and token.role != "device":
                    yield "token", f"{limit} of token {name} is for the role device only"

    def _tls_misfits(self) -> Iterator[tuple[str, str]]:
        if (self.tls_cert is None) != (self.tls_key is None):
            yield "tls_cert", "tls_cert and tls_key go together"
        if self.client_ca and not self.tls_cert:
            yield "client_ca", "client certificates need TLS: set tls_cert and tls_key"
        if self.client_ca and not self.agent_key_file:
            yield (
                "client_ca",
                "agents have no client certificate, so they need credentials: set agent_key_file",
            )
