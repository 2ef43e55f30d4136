"""A scheduler that gives each agent its own credential and then calls another scheduler.

The credential is added to the agent's document just before the start, so that no plan, record or log contains it.
It does not change a spec's hash, because it differs for each agent of a class.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping

from nomad_watchdog.clock import Clock
from nomad_watchdog.core.agent_token import TokenClaim, issue
from nomad_watchdog.errors import TerminalError
from nomad_watchdog.host_pressure import HostUsage
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement
from nomad_watchdog.schedulers import (
    Capacity,
    Hint,
    Scheduler,
    Snapshot,
    host_usage,
    open_hosts,
    unchanged_since,
)
from nomad_watchdog.schedulers.agent_document import CREDENTIAL, with_fields
from nomad_watchdog.secret_files import SecretFile
from nomad_watchdog.secret_values import present


class TokenIssuingScheduler:
    """`inner`: the scheduler that starts the agents. `keys`: the first one signs the credentials."""

    def __init__(self, inner: Scheduler, keys: SecretFile, clock: Clock) -> None:
        self.inner, self.keys, self.clock = inner, keys, clock
        self.name, self.capabilities = inner.name, inner.capabilities

    async def prepare(
        self,
        specs: Collection[AgentSpec],
        *,
        shards: Collection[Shard] | None = None,
        trials: Collection[AgentSpec] = (),
    ) -> Mapping[str, str]:
        more = {"trials": trials} if trials else {}
        return await self.inner.prepare(specs, shards=shards, **more)

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        """As `Scheduler.ensure`; raises TerminalError when there is no key."""
        keys = self.keys.now(self.clock.monotonic())
        if not keys:
            raise TerminalError(
                "api.agent_key_file contains no key: the API would refuse the agent's reports"
            )
        signed = issue(keys[0], TokenClaim(record.slug, epoch))
        present(signed)  # removes it from errors, in which a scheduler may quote it
        return await self.inner.ensure(record, epoch, with_fields(spec, **{CREDENTIAL: signed}))

    async def retire(self, placement: Placement, grace_s: float) -> None:
        await self.inner.retire(placement, grace_s)

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        return await self.inner.snapshot(only)

    async def unchanged_since(self, snapshot: Snapshot) -> bool:
        return await unchanged_since(self.inner, snapshot)

    async def open_hosts(self) -> frozenset[str] | None:
        return await open_hosts(self.inner)

    async def host_usage(self, hosts: Collection[str]) -> Mapping[str, HostUsage]:
        return await host_usage(self.inner, hosts)

    def watch(self) -> AsyncIterator[Hint]:
        return self.inner.watch()

    async def capacity(self) -> Capacity:
        return await self.inner.capacity()

    async def sweep(self, dead: Collection[Placement]) -> int:
        return await self.inner.sweep(dead)

    async def close(self) -> None:
        await self.inner.close()
