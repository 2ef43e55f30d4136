"""The listening socket: plain or TLS, with certificates that can change while it listens.

A new certificate takes effect for new connections: each takes the context of the day while it shakes
hands, so that nothing is closed or opened anew. Open connections go on with the old one.
"""

from __future__ import annotations

import asyncio
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

LOOK_EVERY_S: Final = 5.0
"""Certificates are looked at so often, and at once on SIGHUP."""
BACKLOG: Final = 512


class ApiListener:
    """Serves a runner's application where the settings say."""

    def __init__(self, runner: Runner, api: ApiSettings, metrics: Metrics) -> None:
        self.runner, self.api, self.metrics = runner, api, metrics
        self.renew = asyncio.Event()
        """Set it to have the certificates read again now."""
        self.outgoing: ssl.SSLContext | None = None
        """For calls of other replicas; None = without TLS of our own."""
        self._socket: socket.socket | None = None
        self._today: ssl.SSLContext | None = None
        self._state: object = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
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
            self._today = context
            # Called in every handshake, also when the client names no server.
            context.sni_callback = self._take_today
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

    def _take_today(self, connection: ssl.SSLObject, _name: object, _first: ssl.SSLContext) -> None:
        assert self._today is not None
        connection.context = self._today

    async def follow(self) -> None:
        """Take over changed certificates, until cancelled. A pair that does not fit (half of it is
        written, say) changes nothing, and is looked at again."""
        while self.api.secure:
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self.renew.wait()
            except TimeoutError:
                pass
            asked, state = self.renew.is_set(), _state_of(self.api)
            self.renew.clear()
            if state == self._state and not asked:
                continue
            try:
                self._today = await asyncio.to_thread(tls_context, self.api)
                self.outgoing = await asyncio.to_thread(outgoing_context, self.api)
            except UserError as error:
                log.warning("certificates were not taken over", extra={"reason": str(error)})
            else:
                log.info("certificates were read again")
                self._state = state


def tls_context(api: ApiSettings) -> ssl.SSLContext | None:
    """What the settings say of TLS; None = plain HTTP.

    Client certificates are verified when they are sent, and the door asks for one: the paths that
    health checks and nodes ask for stay open to those who have none. Raises UserError."""
    if api.tls_cert is None or api.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A resumed session would skip what has changed since: which authority may sign clients, say.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    try:
        load_chain(context, api.tls_cert, api.tls_key)
    except OSError as error:  # ssl.SSLError too
        raise UserError(
            f"api.tls_cert {api.tls_cert!r}, api.tls_key {api.tls_key!r}: {_said(error)}"
        ) from error
    if api.client_ca is not None:
        load_authorities("api.client_ca", Path(api.client_ca), context)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def outgoing_context(api: ApiSettings) -> ssl.SSLContext | None:
    """As a replica that speaks to another: it trusts whom agents trust, and shows its own certificate
    where one is asked for. Raises UserError."""
    if api.tls_cert is None or api.tls_key is None:
        return None
    try:
        context = trust("api", ca_cert=api.ca_cert or "")
        load_chain(context, api.tls_cert, api.tls_key)
    except OSError as error:
        raise UserError(f"api.ca_cert {api.ca_cert!r}, api.tls_cert: {_said(error)}") from error
    return context


def _said(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a certificate and its key").replace("_", " ").lower()
    return error.strerror or "cannot be read"


def _state_of(api: ApiSettings) -> object:
    state: list[tuple[int, int, int]] = []
    for path in (api.tls_cert, api.tls_key, api.client_ca, api.ca_cert):
        try:
            found = Path(path or "").stat()
        except OSError:
            state.append((0, 0, 0))
        else:
            state.append((found.st_mtime_ns, found.st_size, found.st_ino))
    return state
