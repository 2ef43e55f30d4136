"""The listening socket: plain or TLS, with certificates that can change while it listens.

A new certificate takes effect for new connections, during whose handshake the current context is used. Open
connections continue with the old one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import ssl
from pathlib import Path
from typing import Final

from nomad_watchdog.api.acceptor import Closings, Site, most_connections
from nomad_watchdog.api.connection_limits import AcceptRate, ConnectionLimits
from nomad_watchdog.api.malformed import RUNNER_OPTIONS, Runner
from nomad_watchdog.clients.hashicorp_environment import load_authorities, load_chain, trust
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.errors import UserError
from nomad_watchdog.metrics import Metrics

log = logging.getLogger(__name__)

CHECK_EVERY_S: Final = 5.0
"""Interval between checks for changed certificates. SIGHUP causes one at once."""
BACKLOG: Final = 512


class ApiListener:
    """Serves a runner's application at the address in the settings."""

    def __init__(self, runner: Runner, api: ApiSettings, metrics: Metrics) -> None:
        self.runner, self.api, self.metrics = runner, api, metrics
        self.renew = asyncio.Event()
        """Set it to reread the certificates now."""
        self.outgoing: ssl.SSLContext | None = None
        """TLS for calls to other replicas; None = the API is served without TLS."""
        self._socket: socket.socket | None = None
        self._current: ssl.SSLContext | None = None
        self._state: object = None

    @property
    def port(self) -> int:
        """The port of the listening socket."""
        assert self._socket is not None
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Listen. Raises UserError for an address or a certificate that can't be used."""
        context, self.outgoing = tls_context(self.api), outgoing_context(self.api)
        host, _, port = self.api.listen.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
            self._socket.setblocking(False)
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self._state = _state_of(self.api)
        if context is not None:
            self._current = context
            # Called in every handshake, also when the client names no server.
            context.sni_callback = self._use_current
        await Site(self.runner, self._socket, self._places(), RUNNER_OPTIONS, context).start()

    def _places(self) -> ConnectionLimits:
        clock, api = SystemClock(), self.api
        most = most_connections(api.max_connections)
        places = ConnectionLimits(
            most,
            min(api.max_connections_per_address, most),
            AcceptRate(api.unauthenticated_rate),
            clock.monotonic,
            Closings(self.metrics, clock),
        )
        self.metrics.connections(lambda: (places.unauthenticated, places.authenticated))
        return places

    def _use_current(
        self, connection: ssl.SSLObject, _name: object, _first: ssl.SSLContext
    ) -> None:
        assert self._current is not None
        connection.context = self._current

    async def follow(self) -> None:
        """Load changed certificates, until cancelled. A key and certificate that do not match (for example because
        only one of them was written yet) change nothing and are checked again."""
        while self.api.secure:
            try:
                async with asyncio.timeout(CHECK_EVERY_S):
                    await self.renew.wait()
            except TimeoutError:
                pass
            requested, state = self.renew.is_set(), _state_of(self.api)
            self.renew.clear()
            if state == self._state and not requested:
                continue
            try:
                self._current = await asyncio.to_thread(tls_context, self.api)
                self.outgoing = await asyncio.to_thread(outgoing_context, self.api)
            except UserError as error:
                log.warning("certificates not reloaded", extra={"reason": str(error)})
            else:
                log.info("certificates reloaded")
                self._state = state


def tls_context(api: ApiSettings) -> ssl.SSLContext | None:
    """TLS as in the settings; None = plain HTTP.

    The handshake verifies a client certificate only if the client sends one; `auth` requires it, except on the paths
    for health checks and nodes. Raises UserError."""
    if api.tls_cert is None or api.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A resumed session would skip later changes, for example of the CA for clients.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    try:
        load_chain(context, api.tls_cert, api.tls_key)
    except OSError as error:  # ssl.SSLError too
        raise UserError(
            f"api.tls_cert {api.tls_cert!r}, api.tls_key {api.tls_key!r}: {_error_text(error)}"
        ) from error
    if api.client_ca is not None:
        load_authorities("api.client_ca", Path(api.client_ca), context)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def outgoing_context(api: ApiSettings) -> ssl.SSLContext | None:
    """TLS for calls to other replicas: with the CA certificates that agents trust, and its own certificate as client
    certificate. Raises UserError."""
    if api.tls_cert is None or api.tls_key is None:
        return None
    try:
        context = trust("api", ca_cert=api.ca_cert or "")
        load_chain(context, api.tls_cert, api.tls_key)
    except OSError as error:
        raise UserError(
            f"api.ca_cert {api.ca_cert!r}, api.tls_cert: {_error_text(error)}"
        ) from error
    return context


def _error_text(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a certificate and its key").replace("_", " ").lower()
    return error.strerror or "cannot be read"


def _state_of(api: ApiSettings) -> object:
    """Changes with the content of the files: size and time can stay as they were while a key is replaced."""
    state: list[bytes] = []
    for path in (api.tls_cert, api.tls_key, api.client_ca, api.ca_cert):
        try:
            state.append(hashlib.sha256(Path(path or "").read_bytes()).digest())
        except OSError:
            state.append(b"")
    return state
