"""Sessions and locks of Consul: what leases stand on.

A session here lives as long as its own TTL check is passed, and no node's check can end it: with the
node's own check a blip of the gossip would cost every lease. No renewal, and no pass of a check that passes
already, is a write of the servers (tried on Consul 1.21).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import consul.exceptions  # type: ignore[import-untyped]  # py-consul ships no types
from consul.callback import CB  # type: ignore[import-untyped]

from nomad_watchdog.clients.consul import ConsulClient
from nomad_watchdog.errors import FencedError
from nomad_watchdog.secret_values import know

SESSION_TTL_S: Final = 15
"""The least that Consul takes is 10. It is the second net: it ends a session whose Consul agent is gone
and can't fail the check."""
_NEEDS: Final = 'session "NODE" { policy = "write" }, for the node of this Consul agent'


class ConsulSessions:
    """Raises what `ConsulClient` raises; FencedError where a session is over."""

    def __init__(self, client: ConsulClient) -> None:
        self._client = client
        self._library = client.library

    async def announce(
        self, name: str, service_id: str, check_id: str, ttl_s: float, *, place: tuple[str, int]
    ) -> None:
        """Register a service with a TTL check that passes from now on. Idempotent.

        A check that is there already keeps its status when it is registered again (Consul 1.21.0): one
        that went critical would stay so, and no session could be made of it."""
        check = {"CheckID": check_id, "TTL": f"{round(ttl_s * 1000)}ms", "Status": "passing"}

        async def both() -> None:
            agent = self._library.agent
            await agent.service.register(
                name, service_id=service_id, address=place[0], port=place[1], check=check
            )
            await agent.check.ttl_pass(check_id)

        await self._client.call(
            both,
            what=f"registration of {service_id}",
            needs=f'service "{name}" {{ policy = "write" }}',
        )

    async def retract(self, service_id: str) -> None:
        """Take a service out again; one that is not there is success."""
        await self._client.call(
            lambda: self._library.agent.service.deregister(service_id),
            what=f"deregistration of {service_id}",
            needs=f'service "{service_id}" {{ policy = "write" }}',
        )

    async def beat(self, check_id: str, session: str) -> None:
        """Pass the TTL check, then renew the session. FencedError: one of the two is not there."""

        async def both() -> None:
            try:
                passed = await self._library.agent.check.ttl_pass(check_id)
                await self._library.session.renew(session)
            except consul.exceptions.NotFound as error:
                raise FencedError("our session is gone from Consul") from error
            if not passed:
                raise FencedError("our check is gone from Consul")

        await self._client.call(both, what="renewal of the session", needs=_NEEDS)

    async def create(self, name: str, check_id: str) -> str:
        """A session that ends when the service check does, or SESSION_TTL_S after the last beat. Its locks
        are free at once then. For 0.4 s after a Consul agent's start this is a TransientError."""
        wanted = {
            "Name": name,
            "NodeChecks": [],
            "ServiceChecks": [{"ID": check_id}],
            "LockDelay": "0s",
            "Behavior": "release",
            "TTL": f"{SESSION_TTL_S}s",
        }
        http = self._library.own_http
        session = await self._client.call(
            lambda: http.put(
                CB.json(is_id=True), "/v1/session/create", data=json.dumps(wanted), headers={}
            ),
            what="creation of a session",
            needs=_NEEDS,
        )
        know(str(session), rotates=True)
        return str(session)

    async def destroy(self, session: str) -> None:
        """End a session; idempotent."""
        await self._client.call(
            lambda: self._library.session.destroy(session), what="end of a session", needs=_NEEDS
        )

    async def lock(self, key: str, value: bytes, session: str) -> bool:
        """Take a lock and write its value; False when another session has it.

        Raises FencedError when this session is over."""
        taken = await self._client.call(
            lambda: self._library.kv.put(key, value, acquire=session),
            what=f"lock of {key}",
            needs=f'key "{key}" {{ policy = "write" }}',
        )
        return bool(taken)

    async def unlock(
        self, keys: Sequence[str], session: str, *, forget: Sequence[str] = ()
    ) -> None:
        """Let go of locks, and delete the keys of `forget`, all at once (at most 63 in all).

        Raises FencedError, ConflictError or TerminalError when one of them was not ours any more: then
        none is let go of, and ending the session does it."""
        operations: list[dict[str, Any]] = [
            {"Verb": "unlock", "Key": key, "Value": "", "Session": session} for key in keys
        ]
        operations += [{"Verb": "delete", "Key": key} for key in forget]
        await self._client.txn(operations)
