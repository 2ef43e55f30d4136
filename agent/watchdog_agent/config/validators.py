"""Checks that more than one part of the configuration needs."""

from __future__ import annotations

from watchdog_agent.errors import ConfigError
from watchdog_agent.runtime import address
from watchdog_agent.runtime.http import Url

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from watchdog_agent.runtime.types import Config, Probe


def number(config: Config, name: str, default: float, low: float, high: float) -> None:
    """Fill in the default; a number from low to high. Raises ConfigError."""
    value = config.setdefault(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; allowed are {low:g} to {high:g}")


def flag(config: Config, name: str, default: bool) -> None:  # a value, not a mode
    """Fill in the default; true or false. Raises ConfigError."""
    if type(config.setdefault(name, default)) is not bool:
        raise ConfigError(f"{name} is {config[name]!r}; allowed are true and false")


def text(config: Config, name: str, default: str | None, most: int = 1024) -> None:
    """Fill in the default; printable text of 1 to `most` characters. Raises ConfigError."""
    value = config.setdefault(name, default)
    if value is None or value == default:
        return
    if not isinstance(value, str) or not 0 < len(value) <= most or not value.isprintable():
        raise ConfigError(f"{name} must be printable text of 1 to {most} characters")


def port(config: Config, where: str, default: int | None = None) -> None:
    """Fill in the default; a port. Raises ConfigError."""
    value = config.get("port") if config.get("port") is not None else default
    if type(value) is not int or not 0 < value < 65536:
        kind = config["kind"]
        raise ConfigError(f"{where}: port of {kind} is {value!r}; allowed are 1 to 65535")
    config["port"] = value


def host(value: object, name: str) -> str:
    """A host name or an IP address, by the rule of `address`. Raises ConfigError."""
    try:
        return address.checked(value)
    except address.AddressError as error:
        raise ConfigError(f"{name}: {error}") from None


def check_trust(probe: Probe, where: str, *, later: bool = False) -> None:
    """Whom the probe believes, and who it is itself; under `trust`. Raises ConfigError. `later`: a file that
    cannot be used now does not raise; `Trust.now` does, each time until it can."""
    flag(probe, "verify", True)
    for name in ("ca_cert", "client_cert", "client_key"):
        if not isinstance(probe.setdefault(name, ""), str):
            kind = "PEM text or the path of a file" if name == "ca_cert" else "the path of a file"
            raise ConfigError(f"{where}: {name} must be {kind}")
    if probe["client_key"] and not probe["client_cert"]:
        raise ConfigError(f"{where}: client_key needs client_cert")
    if probe.get("server_name") is not None:
        probe["server_name"] = host(probe["server_name"], f"{where}: server_name")
    from watchdog_agent.runtime.tls_trust import Trust  # loads ssl

    probe["trust"] = Trust(probe, later=later)


def check_url(url: Any, what: str, *, tls: bool) -> None:
    """Raises ConfigError."""
    try:
        Url(url, tls=tls)
    except (ValueError, AttributeError):
        raise ConfigError(f"{url!r} is not an {what}") from None


def check_list(config: Config, name: str) -> list[Any]:
    """The list, empty when there is none. Raises ConfigError."""
    value = config.get(name, [])
    if not isinstance(value, list) or len(value) > 32:
        raise ConfigError(f"{name} must be a list of at most 32")
    return value
