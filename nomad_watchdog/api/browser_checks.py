"""What a browser must not be made to do: call us by a name of somebody else, or read or change something for another
page.

A page of `evil.example` whose name is made to resolve to our address (DNS rebinding) calls us by that name, so only
names that are ours are answered. A numeric address can't be rebound: agents, probes and replicas may use any.
"""

from __future__ import annotations

import socket
from functools import lru_cache
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from nomad_watchdog.api.errors import SAFE, RequestError
from nomad_watchdog.config.api import ApiSettings

_PORT_DIGITS: Final = 5


def names_of(api: ApiSettings) -> frozenset[str]:
    """The names that are ours: those of the settings, and this machine's own."""
    urls = (urlsplit(url).hostname or "" for url in (api.advertise, api.own_address) if url)
    listened = api.listen.rpartition(":")[0]
    found = {*api.hosts, *urls, listened, socket.gethostname()}
    return frozenset(_plain(name) for name in found if name)


def check_origin(request: web.Request, hosts: frozenset[str]) -> None:
    """Raises RequestError: 421 for a Host that is not ours, 403 for what another site's page asks for. A link to us
    on another site's page is followed, but what it leads to is in no frame there.
    https://www.w3.org/TR/fetch-metadata/"""
    # Health checks of HTTP/1.0 send none; every browser does.
    host = request.headers.get("Host")
    if host is not None and not _ours(host, hosts):
        raise RequestError(
            421,
            "misdirected_request",
            "the Host header is not a name of this server; call it by an IP address, or add the name to api.hosts",
        )
    headers = request.headers
    foreign = headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"}
    if request.method in SAFE:
        purpose = headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")
        foreign = foreign and purpose != ("navigate", "document")
    elif (origin := headers.get("Origin")) is not None:
        foreign = foreign or not _same(origin, host or "")
    if foreign:
        raise RequestError(403, "cross_site", "requests from other sites' pages are refused")


def _same(origin: str, host: str) -> bool:
    """The scheme is not compared: behind a proxy that ends TLS we do not know it. `null` is nobody's."""
    scheme, separator, place = origin.lower().partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme, "")
    return bool(separator and default) and place.removesuffix(default) == (
        host.lower().removesuffix(default)
    )


def _name_in(host: str) -> str:
    """Without the port; of an IPv6 address without its brackets. "" if it is neither."""
    name, separator, port = host.rpartition(":")
    if not separator or host.endswith("]"):
        name, port = host, "0"
    if not (port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS):
        return ""
    return _plain(name)


def _plain(name: str) -> str:
    return name.strip("[]").removesuffix(".").lower()


@lru_cache(maxsize=1024)
def _ours(host: str, hosts: frozenset[str]) -> bool:
    name = _name_in(host)
    if name in hosts or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
