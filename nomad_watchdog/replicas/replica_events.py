"""Events about the replicas of the control plane: which one is gone, which one joined, who took over shards."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from typing import Final

from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Shard
from nomad_watchdog.replicas.leases import Leases

log = logging.getLogger(__name__)

_CHECK_EVERY_S: Final = 0.25


class ReplicaWatcher:
    """Publishes events when the replicas or the holders of shards change."""

    def __init__(self, fleet: Fleet, leases: Leases) -> None:
        self._fleet = fleet
        self._leases = leases
        self._there: dict[str, str] | None = None
        """Replica → where its API is, as last seen; None: not read yet."""
        self._seen: object = None
        self._holders: dict[Shard, str] = {}
        """Shard → the last replica that was seen to hold it."""

    async def run(self) -> None:
        """Publish what changes until cancelled."""
        while True:
            self.check()
            await asyncio.sleep(_CHECK_EVERY_S)

    def check(self) -> None:
        """Publish what has changed since the last call; the first one only remembers."""
        seen = (tuple(self._leases.replicas()), tuple(self._leases.all()))
        if seen == self._seen:
            return
        self._seen = seen
        there = {one.id: one.api for one in self._leases.replicas()}
        if self._leases.replica not in there:
            return  # the leases are not complete yet, or no longer
        self._report_replicas(there)
        self._report_shards()

    def _report_replicas(self, there: dict[str, str]) -> None:
        own = self._leases.replica
        before = there if self._there is None else self._there
        for name in sorted(before.keys() - there.keys() - {own}):
            held = sorted(shard for shard, holder in self._holders.items() if holder == name)
            what = f"; it held {_named(held)}" if held else ""
            self._note("replica.gone", name, f"replica {name} ({before[name]}) is gone{what}")
        for name in sorted(there.keys() - before.keys() - {own}):
            self._note("replica.joined", name, f"replica {name} ({there[name]}) has joined")
        if self._there is None:
            log.info("replicas are known", extra={"replicas": sorted(there)})
        self._there = there

    def _report_shards(self) -> None:
        own, taken = self._leases.replica, defaultdict(list)
        for lease in self._leases.all():
            last = self._holders.get(lease.shard, "")
            if lease.holder == own and last not in ("", own):
                taken[last].append(lease.shard)
            if lease.holder:
                self._holders[lease.shard] = lease.holder
        for last, shards in taken.items():
            text = f"replica {own} took over {_named(shards)} from {last}"
            self._note("shards.taken", own, text, shards=shards)

    def _note(self, kind: str, name: str, text: str, **data: object) -> None:
        self._fleet.events.note_fleet(kind, text, {"replica": name, **data})


def _named(shards: list[Shard]) -> str:
    return f"{'shard' if len(shards) == 1 else 'shards'} {', '.join(map(str, shards))}"
