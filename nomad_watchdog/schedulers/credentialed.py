"""Each agent starts with a credential of its own: a scheduler around the one that does the work.

It is put into the agent's document at the last moment, so that no backend knows of it and no plan, record
or log can hold it. It must not change a spec's hash: it differs for each agent of a class.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import replace

from nomad_watchdog.clock import Clock
from nomad_watchdog.core.agent_token import TokenClaim, issue
from nomad_watchdog.errors import TerminalError
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement
from nomad_watchdog.schedulers import Capacity, Hint, Scheduler, Snapshot, unchanged_since
from nomad_watchdog.schedulers.agent_document import class_part
from nomad_watchdog.secret_files import SecretFile
from nomad_watchdog.secret_values import present

FIELD = "credential"
"""In the agent's document (watchdog_agent.wire)."""


class TokenIssuingScheduler:
    """`inner`, whose agents get a credential signed by the first key of `keys`."""

    def __init__(self, inner: Scheduler, keys: SecretFile, clock: Clock) -> None:
        self.inner, self.keys, self.clock = inner, keys, clock
        self.name, self.capabilities = inner.name, inner.capabilities

    async def prepare(
        self, specs: Collection[AgentSpec], *, shards: Collection[Shard] | None = None
    ) -> Mapping[str, str]:
        return await self.inner.prepare(specs, shards=shards)

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        """As `Scheduler.ensure`; raises TerminalError when no key is left to sign with."""
        keys = self.keys.now(self.clock.monotonic())
        if not keys:
            raise TerminalError("api.agent_key_file holds no key: the agent would not be believed")
        signed = issue(keys[0], TokenClaim(record.slug, epoch))
        present(signed)  # a scheduler may quote it in an error
        return await self.inner.ensure(record, epoch, with_credential(spec, signed))

    async def retire(self, placement: Placement, grace_s: float) -> None:
        await self.inner.retire(placement, grace_s)

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        return await self.inner.snapshot(only)

    async def unchanged_since(self, snapshot: Snapshot) -> bool:
        return await unchanged_since(self.inner, snapshot)

    def watch(self) -> AsyncIterator[Hint]:
        return self.inner.watch()

    async def capacity(self) -> Capacity:
        return await self.inner.capacity()

    async def sweep(self, dead: Collection[Placement]) -> int:
        return await self.inner.sweep(dead)

    async def close(self) -> None:
        await self.inner.close()


def with_credential(spec: AgentSpec, credential: str) -> AgentSpec:
    """The spec with the credential in its document. Raises UserError when that is no JSON object."""
    text = json.dumps(class_part(spec) | {FIELD: credential}, sort_keys=True, separators=(",", ":"))
    return replace(spec, agent_config=text)
