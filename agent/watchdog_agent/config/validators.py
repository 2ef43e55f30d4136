"""Checks that more than one part of the configuration needs."""

from __future__ import annotations

from watchdog_agent.errors import ConfigError
from watchdog_agent.runtime import address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.types import Config


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
