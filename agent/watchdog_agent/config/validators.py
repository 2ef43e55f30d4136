"""Validation functions shared by several parts of the configuration."""

from __future__ import annotations

from watchdog_agent.config import table
from watchdog_agent.errors import ConfigError
from watchdog_agent.runtime import address, parsing
from watchdog_agent.runtime.http import Url

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Protocol

    from watchdog_agent.runtime.types import Document

    class Rule(Protocol):
        """A rule of `config.table`."""

        def check(self, value: object) -> None: ...


MAX_SHOWN = 80


def checked(part: Document) -> Any:
    """Return a fully checked part of the document as its TypedDict."""
    return part


def fill(part: Document, rules: type, where: str = "") -> None:
    """Check the settings in a class of `config.table`, and fill in defaults. Raises ConfigError."""
    for name, rule in vars(rules).items():
        if name[0] == "_":
            continue
        value = part.get(name)
        default = getattr(rule, "default", None)
        if name not in part and default is not None:
            part[name] = default
        elif value is not None or default is not None:
            require(part, name, rule, where)
            if isinstance(rule, table.Whole) and isinstance(value, float):
                part[name] = int(value)


def require(part: Mapping[str, object], name: str, rule: Rule, where: str = "") -> None:
    """Check one setting. Raises ConfigError, which quotes the value unless it is long."""
    try:
        rule.check(part.get(name))
    except ValueError as error:
        before = f"{where}: " if where else ""
        value = repr(part.get(name))
        found = f" is {value}" if len(value) <= MAX_SHOWN else ""
        raise ConfigError(f"{before}{name}{found}; {error}") from None


def place(value: object, default_port: int) -> tuple[str, int]:
    """Parse HOST or HOST:PORT into (host, port). Raises ValueError."""
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if isinstance(value, str) and (":" not in value or address.literal(value)):
        host, port = value, str(default_port)
    try:
        number = parsing.whole(port, 1, 65535)
    except ValueError:
        raise ValueError(f"{value!r} is not HOST or HOST:PORT") from None
    return address.checked(host), number


def host(value: object, name: str) -> str:
    """Check a host name or an IP address by the rule of `address`. Raises ConfigError."""
    try:
        return address.checked(value)
    except address.AddressError as error:
        raise ConfigError(f"{name}: {error}") from None


def check_trust(probe: Document, where: str, *, later: bool = False) -> None:
    """Put the trusted CAs and the client certificate under `trust`. Raises ConfigError. With `later`, a file that
    cannot be used now does not raise here; instead `Trust.now` raises until it can be used."""
    require({"verify": probe.setdefault("verify", True)}, "verify", table.Flag(True), where)
    for name in ("ca_cert", "client_cert", "client_key"):
        if not isinstance(probe.setdefault(name, ""), str):
            kind = "PEM text or the path of a file" if name == "ca_cert" else "the path of a file"
            raise ConfigError(f"{where}: {name} must be {kind}")
    if probe["client_key"] and not probe["client_cert"]:
        raise ConfigError(f"{where}: client_key needs client_cert")
    if probe.get("server_name") is not None:
        probe["server_name"] = host(probe["server_name"], f"{where}: server_name")
    from watchdog_agent.runtime.tls_trust import Trust  # loads ssl

    probe["trust"] = Trust(checked(probe), later=later)


def check_url(url: object, what: str, *, tls: bool) -> None:
    """Check a URL. Raises ConfigError."""
    try:
        Url(str(url), tls=tls)
    except ValueError:
        raise ConfigError(f"{url!r} is not an {what}") from None


def check_list(config: Document, name: str) -> list[object]:
    """Return the list, or an empty one if the key is missing. Raises ConfigError."""
    value = config.get(name, [])
    if not isinstance(value, list) or len(value) > 32:
        raise ConfigError(f"{name} must be a list of at most 32")
    return value
