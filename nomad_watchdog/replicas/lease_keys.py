"""The keys in Consul that state which control planes there are, and which one holds each shard.

Below ``<prefix>/leadership/``: ``replicas/<id>`` for a control plane, and ``shards/<n>`` for the holder of a shard.
Both are locked by the session of the control plane that they name, so they end with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from watchdog_agent.runtime.parsing import loads, whole

from nomad_watchdog.clients.consul import ConsulClient, KvRow
from nomad_watchdog.ids import Shard
from nomad_watchdog.replicas.leases import Lease, Replica


@dataclass(frozen=True, slots=True)
class LeaseView:
    """The content of the keys. Other programs can write them, too, so what makes no sense is left out."""

    replicas: Mapping[str, Replica] = field(default_factory=dict)
    """By session."""
    leases: Mapping[Shard, Lease] = field(default_factory=dict)
    sessions: Mapping[Shard, str] = field(default_factory=dict, repr=False)
    stale: tuple[KvRow, ...] = field(default=(), repr=False)
    """Keys of replicas whose session is over."""

    @property
    def addresses(self) -> frozenset[str]:
        """Where agents reach the replicas."""
        return frozenset(one.address for one in self.replicas.values())


@dataclass(frozen=True, slots=True)
class LeaseKeys:
    """Names of the keys below one prefix."""

    prefix: str

    @property
    def folder(self) -> str:
        return f"{self.prefix}/leadership/"

    def replica(self, replica: str) -> str:
        return f"{self.folder}replicas/{replica}"

    def shard(self, shard: Shard) -> str:
        return f"{self.folder}shards/{shard}"

    def view(self, rows: Iterable[KvRow]) -> LeaseView:
        """The content of the rows below the folder."""
        replicas, locks, stale = {}, {}, []
        for row in rows:
            kind, _, name = row.key.removeprefix(self.folder).partition("/")
            if kind == "replicas" and row.session:
                replicas[row.session] = _replica(name, row)
            elif kind == "replicas":
                stale.append(row)
            elif kind == "shards" and row.session:
                with suppress(ValueError):
                    locks[Shard(whole(name, 0, 2**31))] = row
        leases = {
            shard: _lease(shard, row, replicas.get(row.session)) for shard, row in locks.items()
        }
        sessions = {shard: row.session for shard, row in locks.items()}
        return LeaseView(replicas, leases, sessions, tuple(stale))


async def read_replicas(client: ConsulClient, prefix: str) -> list[Replica]:
    """The control planes that exist now, for a command that is none of them. Raises as `ConsulClient`."""
    keys = LeaseKeys(prefix)
    _, rows = await client.kv_tree(keys.folder)
    return sorted(keys.view(rows).replicas.values(), key=lambda one: one.id)


def _replica(name: str, row: KvRow) -> Replica:
    fields = _fields(row)
    return Replica(
        id=name,
        api=str(fields.get("api", "")),
        since=_number(fields.get("since")),
        shards=int(_number(fields.get("shards"))),
        version=str(fields.get("version", "")),
        config=str(fields.get("config", "")),
        advertise=str(fields.get("advertise", "")),
    )


def _lease(shard: Shard, row: KvRow, holder: Replica | None) -> Lease:
    fields = _fields(row)
    return Lease(
        shard=shard,
        # A session without the key of a replica belongs to one that starts or ends.
        holder=holder.id if holder is not None else str(fields.get("replica") or "?"),
        api=holder.api if holder is not None else "",
        since=_number(fields.get("since")),
        term=row.lock_index,
    )


def _fields(row: KvRow) -> Mapping[str, object]:
    try:
        found = loads(row.value)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
