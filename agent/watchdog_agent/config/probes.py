"""One probe of the configuration, checked. What only one kind knows is checked in that kind's own
module, which is loaded only where the kind is configured."""

from __future__ import annotations

from watchdog_agent.config import validators
from watchdog_agent.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from watchdog_agent.runtime.types import Probe


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
"""Kind → the module that knows it: it has `check(probe, where)` and `start(loop, probe, address, ended)`.
tcp, http and icmp are in `probes.builtin`."""
KINDS = ("tcp", "http", "icmp", *MODULES)
MAX_STATUSES = 32


def module_of(kind: str) -> Any:
    """The module of a kind that is in MODULES, loaded now if it was not."""
    return __import__(f"watchdog_agent.probes.{MODULES[kind]}", fromlist=["start"])


def check(probe: Any, where: str) -> Probe:
    """The probe with defaults filled in. Raises ConfigError."""
    if not isinstance(probe, dict) or probe.get("kind") not in KINDS:
        kind = probe.get("kind") if isinstance(probe, dict) else probe
        raise ConfigError(f"{where}: kind is {kind!r}; allowed are {', '.join(KINDS)}")
    kind = probe["kind"]
    if kind == "http" and probe.get("tls"):
        kind = probe["kind"] = "https"
    if kind in ("tcp", "http") or (kind == "icmp" and probe.get("port") is not None):
        validators.port(probe, where)
    validators.number(probe, "interval_s", 5.0, 0.05, 86400.0)
    validators.number(probe, "timeout_s", 2.0, 0.01, 600.0)
    validators.number(probe, "misses", 3, 1, 1000)
    validators.number(probe, "jitter", 0.05, 0.0, 0.5)
    validators.number(probe, "min_interval_s", 0.5, 0.05, 86400.0)
    _check_warnings(probe, where)
    if kind in ("http", "https"):
        check_http(probe, where)
    if kind in MODULES:
        try:
            module_of(kind).check(probe, where)
        except ImportError as error:
            raise ConfigError(f"{where}: {kind} can't be had here: {error}") from None
    return probe


OLD_NAMES = (("max_time_s", "warn_time_s"), ("min_days", "warn_days"))


def _check_warnings(probe: Probe, where: str) -> None:
    """The thresholds beyond which a success is a warning. Raises ConfigError."""
    for old, name in OLD_NAMES:
        value = probe.pop(old, None)
        if value is not None and probe.setdefault(name, value) != value:
            raise ConfigError(f"{where}: {old} is the old name of {name}; set {name} only")
    if probe.get("warn_time_s") is not None:
        validators.number(probe, "warn_time_s", 0.0, 0.001, 600.0)
    if probe.get("warn_loss") is not None:
        validators.number(probe, "warn_loss", 0.0, 0.001, 1.0)


def check_http(probe: Probe, where: str) -> None:
    """Path and expectations. Raises ConfigError."""
    path = probe.get("path", "/")
    if (
        not isinstance(path, str)
        or not path.startswith("/")
        or any(not "!" <= c <= "~" for c in path)
    ):
        raise ConfigError(f"{where}: path is {path!r}; it must begin with / and be printable ASCII")
    wanted = probe.setdefault("expect_status", 200)
    several = wanted if isinstance(wanted, list) else [wanted]
    if not 0 < len(several) <= MAX_STATUSES or any(type(one) is not int for one in several):
        raise ConfigError(
            f"{where}: expect_status is {wanted!r}; it must be a number, or a list of 1 to {MAX_STATUSES}"
        )
    validators.text(probe, "expect_body", None)


def name_of(spec: Probe) -> str:
    """How a probe is called in reasons: http:8080, tcp:22, icmp, plugin:modbus. An ICMP probe that had to ask
    TCP is called what it was."""
    if spec.get("instead"):
        return f"tcp:{spec['instead']}"
    if spec["kind"] == "plugin":
        return f"plugin:{spec['plugin']}"
    return f"{spec['kind']}:{spec['port']}" if spec.get("port") else spec["kind"]
