"""Settings of the probes of a device, and of the gateway in front of it."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator
from watchdog_agent.config import optional_table, table
from watchdog_agent.config.probes import name_of
from watchdog_agent.config.table import ProbeTable as Every
from watchdog_agent.probes.dns import DnsError, encode_name

from nomad_watchdog.config.types import (
    Absolute,
    Block,
    Command,
    Duration,
    Host,
    Phrase,
    Plugin,
    Text,
    fitting,
    within,
)
from nomad_watchdog.units import show


def checked_domain(value: str) -> str:
    """A domain name that fits in a DNS query. Raises ValueError."""
    try:
        encode_name(value)
    except DnsError as error:
        raise ValueError(f"{show(value)}: {error}") from None
    return value


Kind = Literal[
    "tcp", "http", "https", "icmp", "tls", "dns", "command", "file", "mqtt", "snmp", "plugin"
]
Port = Annotated[int, within(table.PORT)]
Status = Annotated[int, within(table.STATUS)]
Domain = Annotated[str, fitting(optional_table.DnsProbe.name), AfterValidator(checked_domain)]

_HTTP: Final = frozenset({"port", "path", "expect_status", "expect_body", "max_time"})
_TLS: Final = frozenset({"port", "server_name", "verify", "ca_cert", "client_cert", "client_key"})
KNOWS: Final[Mapping[str, frozenset[str]]] = {
    "tcp": frozenset({"port"}),
    "http": _HTTP,
    "https": _HTTP | _TLS,
    "icmp": frozenset(),
    "tls": _TLS | {"warn_days", "min_days"},
    "dns": frozenset({"port", "server", "name", "type", "expect_address"}),
    "command": frozenset({"command"}),
    "file": frozenset({"file", "expect_text", "forbid_text", "max_age"}),
    "mqtt": _TLS | {"tls", "user", "password_file"},
    "snmp": frozenset({"port", "community_file"}),
    "plugin": frozenset({"plugin", "settings"}),
}
"""Kind → the settings that it supports in addition to the common ones."""
NEEDS: Final[Mapping[str, str]] = {
    "tcp": "port",
    "http": "port",
    "dns": "name",
    "command": "command",
    "file": "file",
    "plugin": "plugin",
}
ON_HOST: Final = frozenset({"command", "file", "plugin"})
"""Kinds that need not contact the device, so they can't confirm its state independently."""
_SECONDS: Final = frozenset({"max_time", "max_age", "min_interval", "warn_time"})
_OFTEN: Final = ("jitter", "min_interval", "warn_time", "warn_loss")
"""Settings of all kinds that are in the agent's document only if they are set."""
RENAMED: Final[Mapping[str, str]] = {"max_time": "warn_time", "min_days": "warn_days"}
"""Old name of a warning threshold → its current name."""


class ProbeSettings(Block):
    kind: Kind
    port: Port | None = None
    path: Annotated[str, fitting(table.HttpProbe.path)] | None = None
    expect_status: (
        Status
        | Annotated[tuple[Status, ...], Field(min_length=1, max_length=table.MAX_STATUSES)]
        | None
    ) = None
    expect_body: Phrase | None = None
    warn_time: Annotated[Duration, within(Every.warn_time_s)] | None = None
    max_time: Annotated[Duration, within(Every.warn_time_s)] | None = None
    warn_loss: Annotated[float, within(Every.warn_loss)] | None = None
    server_name: Host | None = None
    verify: bool | None = None
    ca_cert: Absolute | None = None
    client_cert: Absolute | None = None
    client_key: Absolute | None = None
    tls: bool | None = None
    warn_days: Annotated[float, within(optional_table.TlsProbe.warn_days)] | None = None
    min_days: Annotated[float, within(optional_table.TlsProbe.warn_days)] | None = None
    server: Host | None = None
    name: Domain | None = None
    type: Literal["A", "AAAA"] | None = None
    expect_address: Text | None = None
    command: Command | None = None
    file: Absolute | None = None
    expect_text: Phrase | None = None
    forbid_text: Phrase | None = None
    max_age: Annotated[Duration, within(optional_table.FileProbe.max_age_s)] | None = None
    user: Phrase | None = None
    password_file: Absolute | None = None
    community_file: Absolute | None = None
    plugin: Plugin | None = None
    settings: Annotated[dict[str, Text], Field(max_length=64)] | None = None
    interval: Annotated[Duration, within(Every.interval_s)] = Every.interval_s.default
    timeout: Annotated[Duration, within(Every.timeout_s)] = Every.timeout_s.default
    misses: Annotated[int, within(Every.misses)] = Every.misses.default
    jitter: Annotated[float, within(Every.jitter)] | None = None
    min_interval: Annotated[Duration, within(Every.min_interval_s)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ProbeSettings:
        if self.timeout >= self.interval:
            raise ValueError(
                f"timeout ({self.timeout:g}s) must be shorter than interval ({self.interval:g}s)"
            )
        self._check_known()
        self._check_needs()
        self._check_tls()
        self._check_warnings()
        if self.expect_address:
            wanted = 6 if self.type == "AAAA" else 4
            try:
                found = ipaddress.ip_address(self.expect_address).version
            except ValueError:
                raise ValueError("expect_address is not an IP address") from None
            if found != wanted:
                raise ValueError(
                    f"expect_address is not an address of an {self.type or 'A'} record"
                )
        return self

    def _check_needs(self) -> None:
        need = NEEDS.get(self.kind)
        if need and getattr(self, need) is None:
            raise ValueError(f"{self.kind} needs a {need}")
        if self.kind == "file" and not (self.expect_text or self.forbid_text or self.max_age):
            raise ValueError("file needs one of expect_text, forbid_text and max_age")
        if self.password_file and not self.user:
            raise ValueError("password_file needs user")

    def _check_tls(self) -> None:
        if self.client_key and not self.client_cert:
            raise ValueError("client_key needs client_cert")
        if self.kind == "mqtt" and not self.tls:
            given = sorted(one for one in _TLS - {"port"} if getattr(self, one) is not None)
            if given:
                raise ValueError(f"{given[0]} of mqtt needs tls = true")

    @property
    def label(self) -> str:
        """The name of the probe in reasons and in `repair.probe`: http:8080, icmp, plugin:modbus."""
        default = table.PORTS.get(self.kind)
        if self.kind == "mqtt" and self.tls:
            default = table.MQTT_TLS_PORT
        return name_of({"kind": self.kind, "plugin": self.plugin, "port": self.port or default})

    def _check_warnings(self) -> None:
        for old, name in RENAMED.items():
            if getattr(self, old) is not None and getattr(self, name) is not None:
                raise ValueError(f"{old} is the old name of {name}; set {name} only")
        for name in ("warn_time", "max_time"):
            limit = getattr(self, name)
            if limit and limit >= self.timeout:
                raise ValueError(f"{name} must be shorter than timeout, which ends the probe")

    def _check_known(self) -> None:
        others = frozenset().union(*KNOWS.values()) - KNOWS[self.kind]
        for setting in sorted(others):
            if getattr(self, setting) is not None:
                kinds = ", ".join(kind for kind, known in KNOWS.items() if setting in known)
                raise ValueError(f"{self.kind} knows no {setting}; known to: {kinds}")

    def wire(self) -> dict[str, object]:
        """The probe in the agent's document (watchdog_agent.wire). Settings that an older agent would not know are
        omitted if unset, so that a class without them keeps its hash and its agents."""
        out: dict[str, object] = {"kind": self.kind}
        for setting in (*sorted(KNOWS[self.kind]), *_OFTEN):
            value = getattr(self, setting)
            if value is not None:
                name = f"{setting}_s" if setting in _SECONDS else setting
                out[name] = list(value) if isinstance(value, tuple) else value
        if self.kind in ("http", "https"):
            out = {"path": "/", "expect_status": 200} | out
        return out | {
            "interval_s": self.interval,
            "timeout_s": self.timeout,
            "misses": self.misses,
        }


class GatewaySettings(Block):
    """The gateway between the agents of a class and their devices; it is probed when a device does not answer."""

    address: Host | None = None
    kind: Literal["icmp", "tcp", "http"] = "icmp"
    port: Port | None = None
    timeout: Annotated[Duration, within(optional_table.GatewayTable.timeout_s)] = (
        optional_table.GatewayTable.timeout_s.default
    )

    @model_validator(mode="after")
    def _fits(self) -> GatewaySettings:
        if (self.kind == "icmp") != (self.port is None):
            raise ValueError(
                "icmp knows no port" if self.kind == "icmp" else f"{self.kind} needs a port"
            )
        return self

    def wire(self) -> dict[str, object]:
        """The gateway in the agent's document (watchdog_agent.wire)."""
        place = {} if self.address is None else {"address": self.address}
        port = {} if self.port is None else {"port": self.port}
        return {**place, **port, "kind": self.kind, "timeout_s": self.timeout}
