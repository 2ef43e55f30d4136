"""The quota of a device token: the devices that were registered with it, tombstones included.

The registry stores with each record the token that registered the device (`source`), so that the count survives a
restart and is the same on every replica. Requests in progress on this replica are counted too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from aiohttp import web

from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.core.presence import BY_TOKEN
from nomad_watchdog.core.roles import Role
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Presence


class QuotaClaim(AbstractContextManager["QuotaClaim"]):
    """The devices that one request adds to its token, until their records are stored."""

    def __init__(self, request: web.Request) -> None:
        actor, context = request[ACTOR], request.app[CONTEXT]
        self._fleet, self._claims = context.fleet, context.claims
        self._most, self._new = actor.most_devices, 0
        self.token = actor.name.removeprefix(BY_TOKEN) if actor.role is Role.DEVICE else ""
        """The name of the device token; "" = another kind of caller, without a quota."""

    def check(self, device_id: DeviceId) -> None:
        """Count a device that will be registered. Raises RequestError (403) above the quota."""
        source = BY_TOKEN + self.token
        record = self._fleet.records.get(slug_of(device_id))
        known = record is not None and (
            record.presence is Presence.PRESENT or record.source == source
        )
        if not self.token or known:
            return
        if self._fleet.records.owned[source] + self._claims[source] >= self._most:
            raise RequestError(
                403,
                "device_quota",
                f"this token has registered {self._most} devices, its maximum (api.token {self.token}, "
                "max_devices). A removed device counts until its record is deleted "
                "(presence.tombstone_ttl). Raise max_devices, or register with another token",
            )
        self._new += 1
        self._claims[source] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._claims[BY_TOKEN + self.token] -= self._new
