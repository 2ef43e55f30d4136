"""Validation of one probe. Settings of a single kind are checked in that kind's module, which is
loaded only if the kind is configured."""

from __future__ import annotations

from watchdog_agent.config import table, validators
from watchdog_agent.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from watchdog_agent.runtime.types import Document, Probe


MODULES = {
    "tls": "tls",
    "https": "tls",
    "dns": "dns",
    "command": "command",
    "file": "file",
    "mqtt": "mqtt",
    "snmp": "snmp",
    "plugin": "plugin",
}
"""Kind → its module, with `check(probe, where)` and `start(loop, probe, address, ended)`.
tcp, http and icmp are in `probes.builtin`."""
KINDS = ("tcp", "http", "icmp", *MODULES)


def module_of(kind: str) -> Any:
    """Return the module of a kind in MODULES; load it if necessary."""
    return __import__(f"watchdog_agent.probes.{MODULES[kind]}", fromlist=["start"])


def check(probe: object, where: str) -> Probe:
    """Check a probe and fill in defaults. Raises ConfigError."""
    if not isinstance(probe, dict) or probe.get("kind") not in KINDS:
        kind = probe.get("kind") if isinstance(probe, dict) else probe
        raise ConfigError(f"{where}: kind is {kind!r}; allowed are {', '.join(KINDS)}")
    kind = probe["kind"]
    if kind == "http" and probe.get("tls"):
        kind = probe["kind"] = "https"
    _check_port(probe, kind, where)
    _rename(probe, where)
    validators.fill(probe, table.ProbeTable, where)
    if kind in ("http", "https"):
        check_http(probe, where)
    if kind in MODULES:
        try:
            module_of(kind).check(probe, where)
        except ImportError as error:
            raise ConfigError(f"{where}: {kind} can't be had here: {error}") from None
    result: Probe = validators.checked(probe)
    return result


OLD_NAMES = (("max_time_s", "warn_time_s"), ("min_days", "warn_days"))


def _check_port(probe: Document, kind: str, where: str) -> None:
    default = table.PORTS.get(kind)
    if kind == "mqtt" and probe.get("tls"):
        default = table.MQTT_TLS_PORT
    if probe.get("port") is None and default is not None:
        probe["port"] = default
    if kind in ("tcp", "http") or probe.get("port") is not None:
        validators.require(probe, "port", table.PORT, f"{where}: {kind}")


def _rename(probe: Document, where: str) -> None:
    """Rename settings with an old name. Raises ConfigError if both names are set to different values."""
    for old, name in OLD_NAMES:
        value = probe.pop(old, None)
        if value is not None and probe.setdefault(name, value) != value:
            raise ConfigError(f"{where}: {old} is the old name of {name}; set {name} only")


def check_http(probe: Document, where: str) -> None:
    """Check the path and expectations of an HTTP probe. Raises ConfigError."""
    validators.fill(probe, table.HttpProbe, where)
    wanted = probe.setdefault("expect_status", table.STATUS.default)
    several = wanted if isinstance(wanted, list) else [wanted]
    if not 0 < len(several) <= table.MAX_STATUSES:
        raise ConfigError(f"{where}: expect_status must be a list of 1 to {table.MAX_STATUSES}")
    for one in several:
        validators.require({"expect_status": one}, "expect_status", table.STATUS, where)


def name_of(spec: Mapping[str, object]) -> str:
    """The probe's name in reasons, such as http:8080, tcp:22, icmp or plugin:modbus. An ICMP probe that fell back to
    TCP has the name of the TCP probe."""
    if spec.get("instead"):
        return f"tcp:{spec['instead']}"
    if spec["kind"] == "plugin":
        return f"plugin:{spec['plugin']}"
    return f"{spec['kind']}:{spec['port']}" if spec.get("port") else str(spec["kind"])
