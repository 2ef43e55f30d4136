"""Chooses the proxy for the API from the environment, by the rules of curl and of Go's HTTP client."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from nomad_watchdog.errors import UserError
from nomad_watchdog.secret_values import know_url

_DEFAULT_PORT: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """One proxy. `url` may contain a password; `shown` is for messages."""

    url: str
    shown: str


def proxy_for(address: str, env: Mapping[str, str]) -> Proxy | None:
    """The proxy for an address; None = call it directly. Loopback addresses are always called directly, so that the
    token for them does not leave this machine.

    Reads http_proxy, https_proxy and no_proxy; lower case takes precedence over upper case. Raises UserError for an
    unsupported kind of proxy."""
    parts = urlsplit(address)
    host = (parts.hostname or "").rstrip(".")
    port = parts.port or _DEFAULT_PORT.get(parts.scheme, 80)
    if _is_loopback(host) or _is_exempt(host, port, _variable("no_proxy", env)[1]):
        return None
    name, url = _variable(f"{parts.scheme}_proxy", env)
    # In a CGI program HTTP_PROXY is a header of the request (https://httpoxy.org).
    if not url or (name == "HTTP_PROXY" and "REQUEST_METHOD" in env):
        return None
    return _checked(name, url)


def _variable(name: str, env: Mapping[str, str]) -> tuple[str, str]:
    for one in (name, name.upper()):
        if env.get(one, "").strip():
            return one, env[one].strip()
    return name, ""


def _checked(name: str, url: str) -> Proxy:
    whole = url if "://" in url else f"http://{url}"
    know_url(whole)
    try:
        parts = urlsplit(whole)
        place = f"{parts.hostname or ''}:{parts.port or 80}"
    except ValueError:
        raise UserError(f"{name} is not an address; write http://HOST:PORT") from None
    if parts.scheme != "http" or not parts.hostname:
        raise UserError(
            f"{name} names a proxy that is not supported; write http://HOST:PORT, or name the API's "
            "host in no_proxy"
        )
    return Proxy(whole, f"http://{place} (from {name})")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    # Calls to 0.0.0.0 and :: also reach this machine.
    return address is not None and (address.is_loopback or address.is_unspecified)


def _is_exempt(host: str, port: int, exempt: str) -> bool:
    address = _address(host)
    for entry in exempt.replace(",", " ").split():
        if entry == "*":
            return True
        if address is not None and _contains(entry, address):
            return True
        name, _, of_port = (
            entry.partition(":") if entry.count(":") == 1 else (entry.strip("[]"), "", "")
        )
        if of_port and of_port != str(port):
            continue
        name = name.lower().removeprefix("*").lstrip(".").rstrip(".")
        if name and (host == name or (address is None and host.endswith(f".{name}"))):
            return True
    return False


def _contains(network: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an entry of no_proxy is this address, or a network that contains it."""
    try:
        return address in ipaddress.ip_network(network.strip("[]"), strict=False)
    except ValueError:
        return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
