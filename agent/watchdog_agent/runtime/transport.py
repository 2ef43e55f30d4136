"""One HTTP request, with or without TLS."""

from __future__ import annotations

from watchdog_agent.runtime.http import HttpRequest, Url
from watchdog_agent.runtime.http_response import MAX_BODY

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Fetched


def trust(url: Url, ca_cert: str) -> ssl.SSLContext | None:
    """The TLS context that `send` needs for an https address; None for http, which loads no TLS.

    Raises ConfigError."""
    if not url.secure:
        return None
    from watchdog_agent.runtime import tls

    return tls.context_of(ca_cert)


def send(  # the one function for all requests to configured addresses
    loop: Loop,
    url: Url,
    request: bytes,
    timeout_s: float,
    done: Fetched,
    trusted: ssl.SSLContext | None,
    max_body: int = MAX_BODY,
) -> HttpRequest:
    """Send a request to this address, over TLS for https. `trusted`: the result of `trust`."""
    where = (url.host, url.port)
    if not url.secure:
        return HttpRequest(loop, where, request, timeout_s, done, max_body)
    from watchdog_agent.runtime import tls

    assert trusted is not None
    fetch = tls.SecureRequest(loop, where, request, timeout_s, done, trusted, max_body)
    if url.server_name:
        fetch.name = url.server_name.encode("ascii")
    return fetch
