"""The blocks of the configuration that have no module of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from nomad_watchdog.config.types import (
    Absolute,
    Block,
    Fraction,
    Name,
    Positive,
    Seconds,
    Text,
    Url,
    checked_namespace,
    checked_url_or_none,
)


class NomadSettings(Block):
    address: Url = "http://127.0.0.1:4646"
    namespace: Annotated[Text, AfterValidator(checked_namespace)] = "default"
    region: Text | None = None
    token_file: Text | None = None
    ca_cert: Text | None = None
    ca_path: Text | None = None
    client_cert: Text | None = None
    client_key: Text | None = None
    tls_skip_verify: bool = False
    tls_server_name: Text | None = None
    strategy: Literal["dispatch", "register"] = "dispatch"
    job_prefix: Name = "device-watchdog"
    drain: Literal["move", "wait"] = "move"
    leave_ineligible: bool = False

    def leaves(self) -> frozenset[str]:
        """As `Limits.leaves`."""
        which = {"draining": self.drain == "move", "ineligible": self.leave_ineligible}
        return frozenset(name for name, moves in which.items() if moves)


class ConsulSettings(Block):
    address: Url = "http://127.0.0.1:8500"
    namespace: Annotated[Text, AfterValidator(checked_namespace)] | None = None
    token_file: Text | None = None
    ca_cert: Text | None = None
    ca_path: Text | None = None
    client_cert: Text | None = None
    client_key: Text | None = None
    tls_skip_verify: bool = False
    tls_server_name: Text | None = None
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*$")] = (
        "nomad-watchdog"
    )
    service: Name = "device-watchdog-agent"
    agent_address: Annotated[str, AfterValidator(checked_url_or_none)] | None = None
    agent_client_cert: Absolute | None = None
    agent_client_key: Absolute | None = None


class KubernetesSettings(Block):
    kubeconfig: Text | None = None
    context: Text | None = None
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,56}[a-z0-9])?$")] = (
        "nomad-watchdog"
    )
    namespaces: Annotated[int, Field(ge=1, le=64)] = 1
    service_account: Text | None = None
    leave_cordoned: bool = False

    def leaves(self) -> frozenset[str]:
        """As `Limits.leaves`."""
        return frozenset({"cordoned"} if self.leave_cordoned else ())


class LocalSettings(Block):
    directory: Text | None = None
    python: Text | None = None
    fork: bool = True


class RegistrySettings(Block):
    kind: Literal["sqlite", "consul"] | None = None
    path: Text | None = None


class AgentSettings(Block):
    startup_grace: Positive = 60.0
    startup_grace_min: Positive = 15.0
    startup_grace_max: Positive = 900.0
    report_stale: Positive = 45.0
    suspect_max: Positive = 120.0
    repairing_max: Positive = 900.0
    start_max: Seconds = 180.0


class PresenceSettings(Block):
    heartbeat_fresh: Seconds = 15.0
    ttl: Annotated[Positive, Field(ge=1)] | None = None
    grace: Seconds = 30.0
    tombstone_ttl: Annotated[Positive, Field(ge=3_600)] = 7 * 86_400.0
    flap_changes: Annotated[int, Field(ge=0, le=1000)] = 6
    flap_half_life: Annotated[Positive, Field(ge=1)] = 300.0


class RetrySettings(Block):
    initial: Positive = 1.0
    max: Positive = 300.0
    starts_per_hour: Annotated[int, Field(ge=1, le=3600)] = 20
    concurrency: Annotated[int, Field(ge=1, le=64)] = 16


class MassChangeSettings(Block):
    min: Annotated[int, Field(ge=0)] = 5
    fraction: Fraction = 0.10


class IncidentSettings(Block):
    min: Annotated[int, Field(ge=2)] = 3
    fraction: Fraction = 0.20
    window: Positive = 60.0


class EventSettings(Block):
    keep: Annotated[int, Field(ge=1_000, le=1_000_000)] = 100_000
    max_age: Positive = 30 * 86_400.0
    audit_keep: Annotated[int, Field(ge=1_000, le=1_000_000)] = 100_000
    audit_max_age: Positive = 365 * 86_400.0


class LogSettings(Block):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"
