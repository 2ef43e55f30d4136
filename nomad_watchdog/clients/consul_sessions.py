"""Sessions and locks of Consul, which leases are based on.

A session lasts as long as its own TTL check is passed. It does not depend on the node's check, because a short failure
of the gossip would then end every lease. Renewals, and passes of a check that is passing already, are not writes of
the servers (measured on Consul 1.21).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import consul.exceptions  # type: ignore[import-untyped]  # py-consul ships no types
from consul.callback import CB  # type: ignore[import-untyped]

from nomad_watchdog.clients.consul import ConsulClient
from nomad_watchdog.errors import FencedError
from nomad_watchdog.secret_values import know

SESSION_TTL_S: Final = 15
"""TTL of sessions; Consul's minimum is 10 s. It ends a session when its Consul agent is gone, so that the check cannot
fail."""
_NEEDS: Final = 'session "NODE" { policy = "write" }, for the node of this Consul agent'


class ConsulSessions:
    """Methods raise the errors of `ConsulClient`, and FencedError when a session has ended."""

    def __init__(self, client: ConsulClient) -> None:
        self._client = client
        self._library = client.library

    async def announce(
        self, name: str, service_id: str, check_id: str, ttl_s: float, *, place: tuple[str, int]
    ) -> None:
        """Register a service with a passing TTL check. Idempotent.

        An existing check keeps its status when it is registered again (Consul 1.21.0), and no session can be created
        with a critical one. So the check is also passed."""
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
        """Deregister a service. Idempotent."""
        await self._client.call(
            lambda: self._library.agent.service.deregister(service_id),
            what=f"deregistration of {service_id}",
            needs=f'service "{service_id}" {{ policy = "write" }}',
        )

    async def renew(self, check_id: str, session: str) -> None:
        """Pass the TTL check, then renew the session. Raises FencedError when one of them does not exist."""

        async def both() -> None:
            try:
                passed = await self._library.agent.check.ttl_pass(check_id)
                await self._library.session.renew(session)
            except consul.exceptions.NotFound as error:
                raise FencedError("the session no longer exists in Consul") from error
            if not passed:
                raise FencedError("the check no longer exists in Consul")

        await self._client.call(both, what="renewal of the session", needs=_NEEDS)

    async def create(self, name: str, check_id: str) -> str:
        """Create a session that ends when the service check fails, or SESSION_TTL_S after the last renewal. Its locks
        are then released at once. Raises TransientError for 0.4 s after the start of a Consul agent."""
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
        """End a session. Idempotent."""
        await self._client.call(
            lambda: self._library.session.destroy(session), what="end of a session", needs=_NEEDS
        )

    async def lock(self, key: str, value: bytes, session: str) -> bool:
        """Acquire a lock and write its value. Returns False when another session holds it.

        Raises FencedError when this session has ended."""
        taken = await self._client.call(
            lambda: self._library.kv.put(key, value, acquire=session),
            what=f"lock of {key}",
            needs=f'key "{key}" {{ policy = "write" }}',
        )
        return bool(taken)

    async def unlock(
        self, keys: Sequence[str], session: str, *, delete: Sequence[str] = ()
    ) -> None:
        """Release locks and delete the keys of `delete`, in one transaction (at most 63 in all).

        Raises FencedError, ConflictError or TerminalError when the session no longer holds one of them. Then none is
        released; end the session instead."""
        operations: list[dict[str, object]] = [
            {"Verb": "unlock", "Key": key, "Value": "", "Session": session} for key in keys
        ]
        operations += [{"Verb": "delete", "Key": key} for key in delete]
        await self._client.txn(operations)
