"""Protection against web pages that use the API through a user's browser (DNS rebinding, cross-site requests).

A page of `evil.example` whose name resolves to this server's address sends requests with that name as `Host`, so
only this server's own names are accepted. An IP address can't be rebound: agents, probes and replicas may use any.
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
    """The names of this server: those in the settings, and the host name of this machine."""
    urls = (urlsplit(url).hostname or "" for url in (api.advertise, api.own_address) if url)
    listened = api.listen.rpartition(":")[0]
    found = {*api.hosts, *urls, listened, socket.gethostname()}
    return frozenset(_plain(name) for name in found if name)


def check_origin(request: web.Request, hosts: frozenset[str]) -> None:
    """Raises RequestError: 421 for a `Host` that is not a name of this server, 403 for a request by a page of
    another site. A link to this server on another site works, but not in a frame.
    https://www.w3.org/TR/fetch-metadata/"""
    # Health checks with HTTP/1.0 send no Host; every browser does.
    host = request.headers.get("Host")
    if host is not None and not _ours(host, hosts):
        raise RequestError(
            421,
            "misdirected_request",
            "the Host header is not a name of this server; use an IP address, or add the name to api.hosts",
        )
    headers = request.headers
    foreign = headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"}
    if request.method in SAFE:
        purpose = headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")
        foreign = foreign and purpose != ("navigate", "document")
    elif (origin := headers.get("Origin")) is not None:
        foreign = foreign or not _same(origin, host or "")
    if foreign:
        raise RequestError(403, "cross_site", "requests from pages of other sites are refused")


def _same(origin: str, host: str) -> bool:
    """Whether the origin is this host. The scheme is not compared: behind a proxy that terminates TLS it is unknown.
    The origin `null` is no host."""
    scheme, separator, place = origin.lower().partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme, "")
    return bool(separator and default) and place.removesuffix(default) == (
        host.lower().removesuffix(default)
    )


def _name_in(host: str) -> str:
    """The host name without port and brackets; "" if the header is malformed."""
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
