"""Who is at the door, what may they do, and how fast: decided before a body is read.

A caller is known by one of: a token of the configuration, an agent's credential (`core.agent_token`), the
signature of a webhook (`webhook`, which needs the body and so is checked there), or nothing where no token
is configured. With `client_ca` a certificate is asked for besides.
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
"""A refused request is logged so often at most; the others are counted in that line."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks. `role` None: nobody that we know (a public route, or a webhook not checked yet)."""

    name: str
    role: Role | None
    peer: str
    id_prefix: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    claim: TokenClaim | None = None
    """Of an agent's credential: the one device and epoch that it may speak for."""
    most_devices: int = 0
    """Of a device token: the maximum number of devices that it may register."""
    certificate: str = ""
    """Common name in the client's certificate."""

    @property
    def known(self) -> bool:
        """Whether they have shown a token or a credential."""
        return self.role is not None and self.name != _NOBODY

    @property
    def rank(self) -> Rank:
        """Whose share of connections and memory this request takes."""
        if self.role is None:
            return Rank.UNAUTHENTICATED
        return Rank.OPERATOR if self.known and self.role is Role.OPERATOR else Rank.KNOWN

    @property
    def client(self) -> str:
        """Whose share of the API this request takes."""
        return self.name if self.known else self.peer


_NOBODY: Final = "anonymous"
ACTOR: Final = web.RequestKey("actor", Actor)


@dataclass(slots=True)
class Authenticator:
    """Lets requests in. `keyring` None: no token is configured, and everybody may do everything."""

    clock: Clock = field(default_factory=SystemClock)
    keyring: Keyring | None = None
    agent_keys: SecretFile | None = None
    webhook_secrets: SecretFile | None = None
    wants_certificate: bool = False
    buckets: Buckets | None = None
    hosts: frozenset[str] = frozenset()
    """Names that requests may call us by, besides loopback names and numeric addresses."""
    costs: CostLimits | None = None
    streams_per_token: int = 8
    window: ReplayWindow = field(default_factory=ReplayWindow)
    _logged_at: float = float("-inf")
    _unlogged: int = 0

    def take_over(self, new: Authenticator) -> None:
        """Go by the tokens, secrets and rates of another one from now on."""
        self.keyring, self.webhook_secrets = new.keyring, new.webhook_secrets
        old, fresh = self.buckets, new.buckets
        if old is None or fresh is None or (old.rate, old.burst) != (fresh.rate, fresh.burst):
            self.buckets = fresh
        if old_costs := self.costs:
            self.costs = old_costs.changed(new.costs)
        self.streams_per_token = new.streams_per_token

    @property
    def guarded(self) -> bool:
        """Whether callers must say who they are."""
        return self.keyring is not None

    def own_token(self) -> str:
        """What we say to other replicas, who have the same settings; "" = nothing."""
        now = self.clock.monotonic()
        return self.keyring.token_of(Role.OPERATOR, now) if self.keyring is not None else ""

    def let_in(self, request: web.Request, route: Route | None) -> None:
        """Note in the request who this is, if they may come in. route: None = there is no such route.

        Raises RequestError: 401 who are you, 403 you may not, 421 not our name, 429 not so fast."""
        peer = peer_of(request)
        if route is not None and route.public:
            request[ACTOR] = Actor(_NOBODY, None, peer)
            return
        # A page of a foreign name has no token of ours. Who shows one may call us by a name that we had before.
        shows = "Authorization" in request.headers
        if not shows:
            check_origin(request, self.hosts)
        try:
            actor = request[ACTOR] = self._who(request, route, peer)
            if shows and not actor.known:
                check_origin(request, self.hosts)
        except RequestError:
            self._take(peer)  # whoever guesses tokens guesses at the rate of one client
            raise
        rise(request, actor.rank)
        self._take(actor.client)
        self._check_certificate(actor)
        if route is not None and actor.role is not None and not may(actor.role, route.right):
            needed = " or ".join(roles_with(route.right))
            raise RequestError(
                403, "forbidden", f"this needs a token of the role {needed}; yours is {actor.role}"
            )

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Have a request answered. What a caller that is known by a token asks for is charged to that token."""
        actor = request.get(ACTOR)
        if self.costs is None or actor is None or not actor.known or actor.role is None:
            return await handler(request)
        alone = actor.claim is not None
        return await self.costs.answer(
            request, handler, actor.client, actor.role, self.clock, of_one_agent=alone
        )

    def _who(self, request: web.Request, route: Route | None, peer: str) -> Actor:
        certificate = _common_name(request) if self.wants_certificate else ""
        header = request.headers.get("Authorization")
        if header is None and self.webhook_secrets is not None and route and route.signed:
            return Actor("webhook", None, peer, certificate=certificate)
        scheme, _, text = (header or "").partition(" ")
        given = text.strip() if scheme.lower() == "bearer" else ""
        present(given or text or header or "")
        now = self.clock.monotonic()
        if self.agent_keys is not None and given.startswith(f"{PREFIX}."):
            claim = claim_of(self.agent_keys.now(now), given)
            if claim is not None:
                return Actor(
                    f"agent:{claim.slug}",
                    Role.AGENT,
                    peer,
                    claim=claim,
                    certificate=certificate,
                )
        elif self.keyring is None:
            return Actor(_NOBODY, Role.OPERATOR, peer, certificate=certificate)
        elif given:
            holder = self.keyring.holder_of(given.encode("utf-8", "surrogateescape"), now)
            if holder is not None:
                return Actor(
                    f"token:{holder.name}",
                    holder.role,
                    peer,
                    id_prefix=holder.id_prefix,
                    labels=holder.labels,
                    most_devices=holder.most_devices,
                    certificate=certificate,
                )
        raise RequestError(
            401,
            "unauthorized",
            "missing or unknown token; send `Authorization: Bearer <token>`",
            {"WWW-Authenticate": "Bearer"},
        )

    def _take(self, client: str) -> None:
        if self.buckets is None:
            return
        wait_s = self.buckets.take(client, self.clock.monotonic())
        if wait_s:
            raise RequestError(
                429,
                "too_many_requests",
                f"at most {self.buckets.rate:g} requests a second are allowed for long",
                {"Retry-After": str(max(1, math.ceil(wait_s)))},
            )

    def _check_certificate(self, actor: Actor) -> None:
        # An agent has no certificate: its credential is worth less than one, and all that it needs.
        if self.wants_certificate and not actor.certificate and actor.claim is None:
            raise RequestError(
                403,
                "certificate_needed",
                "a client certificate is asked for here, and none was sent",
            )

    @staticmethod
    def claimed(request: web.Request) -> tuple[TokenClaim | None, str]:
        """Whom a caller that was refused claims to speak for, unverified, and its address: for messages."""
        given = request.headers.get("Authorization", "").partition(" ")[2].strip()
        return claimed(given), peer_of(request)

    def refused(self, request: web.Request, status: int, code: str, route: str) -> None:
        """Say in the log that somebody was not let in; a flood of them is one line."""
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
    """The files with secrets that the settings name, by the setting below `api`; none is read."""
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


def door_of(api: ApiSettings) -> Authenticator:
    """The door that the settings describe. Raises UserError for a file that holds no good secret."""
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


def rise(request: web.Request, rank: Rank) -> None:
    """Its connection is at least of this rank from now on, as far as there are places."""
    if not place_of(request).rise(rank):
        request[LAST] = True


def check_prefix(request: web.Request, device_id: DeviceId) -> None:
    """Raises RequestError (403) when this token may not change this device."""
    prefix = request[ACTOR].id_prefix
    if not device_id.startswith(prefix):
        raise RequestError(
            403, "forbidden", f"this token is for devices whose id begins with {prefix!a}"
        )


def permit_of(request: web.Request) -> Callable[[Device], None]:
    """What raises RequestError (403) for a device that this token may not change: because of its id, or
    of a label that it has, or would have. To be asked about the record that is stored, too: a token for
    one site takes no device of another by giving it other labels."""
    labels = request[ACTOR].labels

    def permit(device: Device) -> None:
        check_prefix(request, device.id)
        for key, value in labels:
            if device.labels.get(key) != value:
                raise RequestError(
                    403,
                    "forbidden",
                    f"this token is for devices with the label {key!a} = {value!a}",
                )

    return permit


def peer_of(request: web.Request) -> str:
    """The other side's address; of IPv6 the network, for one host has 2^64 addresses in it."""
    return network_of(request.remote or "unknown")


def _common_name(request: web.Request) -> str:
    """Of the client's certificate, which the handshake has verified; "" without one."""
    found = request.get_extra_info("peercert")
    if not found:
        return ""
    names = [
        value for part in found.get("subject", ()) for key, value in part if key == "commonName"
    ]
    return names[-1][:64] if names else "unnamed"
