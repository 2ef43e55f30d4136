"""HTTPS client. Imported only if an https:// address is configured: the `ssl` module and its library
need more memory per device than the agent's own code (bench/agent.py)."""

from __future__ import annotations

import os
import ssl

from watchdog_agent.errors import ConfigError
from watchdog_agent.runtime import http, http_response
from watchdog_agent.runtime.loop import READ, WRITE

_MARK = b"\xef\xbb\xbf"
"""The UTF-8 byte order mark."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Address, Fetched


def context_of(ca: str) -> ssl.SSLContext:
    """TLS context for the API, from the file in WATCHDOG_CA_CERT or else `ca` (see `trusting`). Raises ConfigError."""
    return trusting(os.environ.get("WATCHDOG_CA_CERT") or ca)


def trusting(ca: str) -> ssl.SSLContext:
    """TLS context (1.2 or later) that trusts only these CAs. `ca`: PEM text or a file path; "" = the system's CAs.

    Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if "BEGIN CERTIFICATE" in ca:
            # Python accepts only ASCII here; a byte order mark and comments are not part of the certificates.
            context.load_verify_locations(cadata=ca.encode("ascii", "ignore").decode())
        elif ca:
            from_file(ca, context.load_verify_locations)
        else:
            context.set_default_verify_paths()
    except OSError as error:
        raise ConfigError(f"ca_cert: {http.reason_of(error)}") from None
    return context


def from_file(path: str, load: Callable[[str], None]) -> None:
    """Call `load` with the path of a PEM file. OpenSSL rejects a byte order mark, so a file with one is replaced by an
    in-memory copy without it. Raises OSError, and any error of `load`."""
    with open(path, "rb") as file:
        raw = file.read()
    if not raw.startswith(_MARK):
        load(path)
        return
    copy = os.memfd_create("pem")
    try:
        os.write(copy, raw[len(_MARK) :])
        load(f"/proc/self/fd/{copy}")
    finally:
        os.close(copy)


class SecureRequest(http.HttpRequest):
    """An HttpRequest over TLS. The handshake runs in the event loop too, within the same timeout."""

    def __init__(  # as HttpRequest
        self,
        loop: Loop,
        address: Address,
        request: bytes,
        timeout_s: float,
        done: Fetched,
        context: ssl.SSLContext,
        max_body: int = http_response.MAX_BODY,
    ) -> None:
        self.context = context
        # Bytes: for text Python would load its IDNA tables, as in `resolve`.
        self.name = http.bare_host(address[0]).encode("ascii")
        self.shaken = False
        super().__init__(loop, address, request, timeout_s, done, max_body)

    def _ready(self, _mask: int) -> None:
        try:
            self._step()
        except ssl.SSLWantReadError:
            self._wait(READ)
        except ssl.SSLWantWriteError:
            self._wait(WRITE)
        except OSError as error:
            self._fail(http.reason_of(error))

    def _wait(self, events: int) -> None:
        assert self.sock is not None
        self.loop.watch(self.sock, events, self._ready)

    def _shake(self) -> None:
        """Run the handshake; raises ssl.SSLWantReadError or SSLWantWriteError until it is complete."""
        assert self.sock is not None
        if not isinstance(self.sock, ssl.SSLSocket):
            self.sock = self.context.wrap_socket(
                self.sock, server_hostname=self.name, do_handshake_on_connect=False
            )
        if not self.shaken:
            self.sock.do_handshake()
            self.shaken = True

    def _step(self) -> None:
        self._shake()
        assert self.sock is not None
        while self.out:
            self.out = self.out[self.sock.send(self.out) :]
        # Read until SSLWantReadError: data that is already decrypted does not wake the selector.
        while self.done is not None:
            self._receive()
