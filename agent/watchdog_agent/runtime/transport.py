"""One HTTP request, over TLS or without."""

from __future__ import annotations

from watchdog_agent.runtime.http import HttpRequest, Url
from watchdog_agent.runtime.http_response import MAX_BODY

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Fetched


def trust(url: Url, ca_cert: str) -> ssl.SSLContext | None:
    """What `send` needs for https to this address; None for http, for which no TLS is loaded.

    Raises ConfigError."""
    if not url.secure:
        return None
    from watchdog_agent.runtime import tls

    return tls.context_of(ca_cert)


def send(  # one place for all that goes to an address of the configuration
    loop: Loop,
    url: Url,
    request: bytes,
    timeout_s: float,
    done: Fetched,
    trusted: ssl.SSLContext | None,
    max_body: int = MAX_BODY,
) -> HttpRequest:
    """A Fetch of this address, with TLS if it is https. `trusted`: what `trust` gave for it."""
    where = (url.host, url.port)
    if not url.secure:
        return HttpRequest(loop, where, request, timeout_s, done, max_body)
    from watchdog_agent.runtime import tls

    assert trusted is not None
    fetch = tls.SecureRequest(loop, where, request, timeout_s, done, trusted, max_body)
    if url.server_name:
        fetch.name = url.server_name.encode("ascii")
    return fetch
