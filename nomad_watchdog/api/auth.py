"""Authentication, authorization and rate limits, before a body is read.

A caller is authenticated by a token of the configuration, by the credential of an agent (`core.agent_token`), or by
the signature of a webhook, which `webhook` verifies because that needs the body. Without configured tokens every
caller may do everything. With `client_ca` callers need a client certificate in addition.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aiohttp import web

from nomad_watchdog.api.acceptor import place_of
from nomad_watchdog.api.browser_checks import check_origin, names_of
from nomad_watchdog.api.connection_limits import Rank, network_of
from nomad_watchdog.api.cost_limits import CostLimits
from nomad_watchdog.api.errors import LAST, RequestError
from nomad_watchdog.api.routing import Handler, Route
from nomad_watchdog.clock import Clock, SystemClock
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.core.agent_token import PREFIX, TokenClaim, claim_of, claimed
from nomad_watchdog.core.rate_limit import Buckets
from nomad_watchdog.core.roles import Role, may, roles_with
from nomad_watchdog.core.webhook_signature import ReplayWindow
from nomad_watchdog.ids import DeviceId
from nomad_watchdog.model import Device
from nomad_watchdog.secret_files import (
    Holder,
    Keyring,
    SecretFile,
    read_keys,
    read_token,
    read_webhook_secrets,
)
from nomad_watchdog.secret_values import present

log = logging.getLogger(__name__)

LOG_EVERY_S: Final = 10.0
"""Minimum interval between log lines about refused requests; a line has the number of those before it."""


@dataclass(frozen=True, slots=True)
class Actor:
    """The caller of a request. `role` None: not authenticated (a public route, or a webhook not verified yet)."""

    name: str
    role: Role | None
    peer: str
    id_prefix: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    claim: TokenClaim | None = None
    """Of an agent's credential: the one device and epoch that it may report for."""
    most_devices: int = 0
    """Of a device token: the maximum number of devices that it may register."""
    certificate: str = ""
    """Common name in the client's certificate."""

    @property
    def known(self) -> bool:
        """Whether the caller has sent a valid token or credential."""
        return self.role is not None and self.name != _ANONYMOUS

    @property
    def rank(self) -> Rank:
        """The rank whose share of connections and memory this request uses."""
        if self.role is None:
            return Rank.UNAUTHENTICATED
        return Rank.OPERATOR if self.known and self.role is Role.OPERATOR else Rank.KNOWN

    @property
    def client(self) -> str:
        """The client whose rate limit this request uses."""
        return self.name if self.known else self.peer


_ANONYMOUS: Final = "anonymous"
ACTOR: Final = web.RequestKey("actor", Actor)


@dataclass(slots=True)
class Authenticator:
    """Authenticates requests. `keyring` None: no token is configured, and every caller may do everything."""

    clock: Clock = field(default_factory=SystemClock)
    keyring: Keyring | None = None
    agent_keys: SecretFile | None = None
    webhook_secrets: SecretFile | None = None
    wants_certificate: bool = False
    buckets: Buckets | None = None
    hosts: frozenset[str] = frozenset()
    """Accepted names in `Host`, in addition to loopback names and IP addresses."""
    costs: CostLimits | None = None
    streams_per_token: int = 8
    window: ReplayWindow = field(default_factory=ReplayWindow)
    _logged_at: float = float("-inf")
    _unlogged: int = 0

    def apply_settings_of(self, new: Authenticator) -> None:
        """Use the tokens, secrets and rates of another one from now on."""
        self.keyring, self.webhook_secrets = new.keyring, new.webhook_secrets
        old, fresh = self.buckets, new.buckets
        if old is None or fresh is None or (old.rate, old.burst) != (fresh.rate, fresh.burst):
            self.buckets = fresh
        if old_costs := self.costs:
            self.costs = old_costs.changed(new.costs)
        self.streams_per_token = new.streams_per_token

    @property
    def guarded(self) -> bool:
        """Whether callers must authenticate."""
        return self.keyring is not None

    def own_token(self) -> str:
        """The token for calls to other replicas, which have the same settings; "" = none."""
        now = self.clock.monotonic()
        return self.keyring.token_of(Role.OPERATOR, now) if self.keyring is not None else ""

    def authenticate(self, request: web.Request, route: Route | None) -> None:
        """Set the caller of a request (`ACTOR`). `route` None: there is no such route.

        Raises RequestError: 401 not authenticated, 403 not permitted, 421 wrong host name, 429 too many requests."""
        peer = peer_of(request)
        if route is not None and route.public:
            request[ACTOR] = Actor(_ANONYMOUS, None, peer)
            return
        # A web page of another site has no token of ours. Callers with a valid token may use any host name.
        has_credential = "Authorization" in request.headers
        if not has_credential:
            check_origin(request, self.hosts)
        try:
            actor = request[ACTOR] = self._identify(request, route, peer)
            if has_credential and not actor.known:
                check_origin(request, self.hosts)
        except RequestError:
            self._count(peer)  # guessing tokens is limited to the rate of one client
            raise
        promote(request, actor.rank)
        self._count(actor.client)
        self._check_certificate(actor)
        if route is not None and actor.role is not None and not may(actor.role, route.right):
            needed = " or ".join(roles_with(route.right))
            raise RequestError(
                403, "forbidden", f"this needs a token of the role {needed}; yours is {actor.role}"
            )

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Handle a request. Its CPU time is charged to the token or credential of the caller."""
        actor = request.get(ACTOR)
        if self.costs is None or actor is None or not actor.known or actor.role is None:
            return await handler(request)
        alone = actor.claim is not None
        return await self.costs.answer(
            request, handler, actor.client, actor.role, self.clock, of_one_agent=alone
        )

    def _identify(self, request: web.Request, route: Route | None, peer: str) -> Actor:
        """The caller of a request. Raises RequestError (401)."""
        certificate = _common_name(request) if self.wants_certificate else ""
        header = request.headers.get("Authorization")
        if header is None and self.webhook_secrets is not None and route and route.signed:
            return Actor("webhook", None, peer, certificate=certificate)
        given = _bearer_token(header or "")
        if self.agent_keys is not None and given.startswith(f"{PREFIX}."):
            actor = self._agent(self.agent_keys, given, peer, certificate)
        elif self.keyring is None:
            actor = Actor(_ANONYMOUS, Role.OPERATOR, peer, certificate=certificate)
        else:
            actor = self._token_holder(self.keyring, given, peer, certificate)
        if actor is None:
            raise RequestError(
                401,
                "unauthorized",
                "missing or unknown token; send `Authorization: Bearer <token>`",
                {"WWW-Authenticate": "Bearer"},
            )
        return actor

    def _agent(self, keys: SecretFile, given: str, peer: str, certificate: str) -> Actor | None:
        claim = claim_of(keys.now(self.clock.monotonic()), given)
        if claim is None:
            return None
        name = f"agent:{claim.slug}"
        return Actor(name, Role.AGENT, peer, claim=claim, certificate=certificate)

    def _token_holder(
        self, keyring: Keyring, given: str, peer: str, certificate: str
    ) -> Actor | None:
        secret = given.encode("utf-8", "surrogateescape")
        holder = keyring.holder_of(secret, self.clock.monotonic()) if given else None
        if holder is None:
            return None
        return Actor(
            f"token:{holder.name}",
            holder.role,
            peer,
            id_prefix=holder.id_prefix,
            labels=holder.labels,
            most_devices=holder.most_devices,
            certificate=certificate,
        )

    def _count(self, client: str) -> None:
        """Count a request of this client. Raises RequestError (429) above the rate limit."""
        if self.buckets is None:
            return
        wait_s = self.buckets.take(client, self.clock.monotonic())
        if wait_s:
            raise RequestError(
                429,
                "too_many_requests",
                f"more than {self.buckets.rate:g} requests per second; retry later",
                {"Retry-After": str(max(1, math.ceil(wait_s)))},
            )

    def _check_certificate(self, actor: Actor) -> None:
        # Agents have no certificate; their credential suffices.
        if self.wants_certificate and not actor.certificate and actor.claim is None:
            raise RequestError(
                403,
                "certificate_needed",
                "this server requires a client certificate, and none was sent",
            )

    @staticmethod
    def claimed(request: web.Request) -> tuple[TokenClaim | None, str]:
        """The unverified device and epoch in the credential of a refused caller, and its address: for messages."""
        given = request.headers.get("Authorization", "").partition(" ")[2].strip()
        return claimed(given), peer_of(request)

    def refused(self, request: web.Request, status: int, code: str, route: str) -> None:
        """Log a refused request; at most one line per LOG_EVERY_S."""
        now = self.clock.monotonic()
        if now - self._logged_at < LOG_EVERY_S:
            self._unlogged += 1
            return
        actor = request.get(ACTOR)
        facts = {"status": status, "code": code, "route": route, "peer": peer_of(request)}
        facts |= {"actor": actor.name if actor else "", "others_before": self._unlogged}
        log.warning("request refused", extra=facts)
        self._logged_at, self._unlogged = now, 0


def secret_files(api: ApiSettings) -> dict[tuple[str, ...], SecretFile]:
    """The files with secrets that the settings name, by the setting below `api`. Reads none of them."""
    found: dict[tuple[str, ...], SecretFile] = {}
    for name, path, reader in (
        ("token_file", api.token_file, read_token),
        ("agent_key_file", api.agent_key_file, read_keys),
        ("webhook_secrets_file", api.webhook_secrets_file, read_webhook_secrets),
    ):
        if path:
            found[(name,)] = SecretFile(f"api.{name}", Path(path), reader)
    for name, token in api.token.items():
        setting = f"the file of api.token {name}"
        found["token", name, "file"] = SecretFile(setting, Path(token.file), read_token)
    return found


def authenticator_of(api: ApiSettings) -> Authenticator:
    """The authenticator of these settings. Raises UserError for a file without a valid secret."""
    files = {setting: file.required() for setting, file in secret_files(api).items()}
    tokens: dict[Holder, SecretFile] = {}
    if ("token_file",) in files:
        tokens[Holder("token_file", Role.OPERATOR)] = files[("token_file",)]
    for name, token in api.token.items():
        labels = tuple(sorted(token.labels.items()))
        holder = Holder(name, Role(token.role), token.id_prefix, labels, token.max_devices)
        tokens[holder] = files["token", name, "file"]
    keyring = Keyring(tokens) if tokens else None
    if keyring is not None:
        keyring.check_distinct()
    return Authenticator(
        keyring=keyring,
        agent_keys=files.get(("agent_key_file",)),
        webhook_secrets=files.get(("webhook_secrets_file",)),
        wants_certificate=api.client_ca is not None,
        buckets=Buckets(api.rate, api.burst),
        hosts=names_of(api),
        costs=CostLimits(api.read_share, api.read_burst),
        streams_per_token=api.streams_per_token,
    )


def promote(request: web.Request, rank: Rank) -> None:
    """Give its connection at least this rank, if there are places of that rank."""
    if not place_of(request).promote(rank):
        request[LAST] = True


def check_prefix(request: web.Request, device_id: DeviceId) -> None:
    """Raises RequestError (403) if this token may not change this device."""
    prefix = request[ACTOR].id_prefix
    if not device_id.startswith(prefix):
        raise RequestError(
            403, "forbidden", f"this token may change only devices whose ID begins with {prefix!a}"
        )


def permit_of(request: web.Request) -> Callable[[Device], None]:
    """A check that raises RequestError (403) for a device that this token may not change, because of its ID or of
    its labels. Call it for the stored record and for the new one: otherwise a token for one site could take over
    a device of another site by changing its labels."""
    labels = request[ACTOR].labels

    def permit(device: Device) -> None:
        check_prefix(request, device.id)
        for key, value in labels:
            if device.labels.get(key) != value:
                raise RequestError(
                    403,
                    "forbidden",
                    f"this token may change only devices with the label {key!a} = {value!a}",
                )

    return permit


def peer_of(request: web.Request) -> str:
    """The client's address; for IPv6 its /64 network, because one host has 2^64 addresses in it."""
    return network_of(request.remote or "unknown")


def _bearer_token(header: str) -> str:
    """The token in an `Authorization` header; "" without one. Whatever the header contains is hidden in logs."""
    scheme, _, text = header.partition(" ")
    token = text.strip() if scheme.lower() == "bearer" else ""
    present(token or text or header)
    return token


def _common_name(request: web.Request) -> str:
    """The common name in the client's certificate, which the handshake has verified; "" without one."""
    found = request.get_extra_info("peercert")
    if not found:
        return ""
    names = [
        value for part in found.get("subject", ()) for key, value in part if key == "commonName"
    ]
    return names[-1][:64] if names else "unnamed"
