"""The scheduler interface: small, level-triggered, the same for every backend.

A backend is found by its name in the entry-point group ``nomad_watchdog.schedulers``; the built-in
ones come through the same door as strangers'. `nomad_watchdog.testing.conformance` is the contract
as a suite; a third party runs it unchanged.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Final, Protocol

from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement

GROUP: Final = "nomad_watchdog.schedulers"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The differences between backends that callers depend on."""

    replaces_in_place: bool = False
    """`ensure` with a higher epoch replaces the running placement by itself, and there are never two at once."""
    restarts: bool = True
    """The backend restarts a crashed agent by itself, at the same epoch."""


@dataclass(frozen=True, slots=True)
class ClosedHost:
    """A host on which the scheduler places no new agents, because an operator asked for that."""

    draining: bool
    """Its agents are to move to other hosts. False: it is only ineligible, and they stay."""
    state: str
    """In a few words, for people: "draining until 2026-11-30T05:00:00Z", for example."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Placements of this installation as of one index; dead ones that the backend still lists too.

    `only`: the slugs that were asked for, None = all. A snapshot is complete for what was asked:
    a slug without an entry has no placement.
    """

    placements: Mapping[Slug, tuple[Placement, ...]]
    index: int
    only: frozenset[Slug] | None = None
    behind: frozenset[Slug] = frozenset()
    """Devices of which it does not show what `index` promises: look again."""
    closed_hosts: Mapping[str, ClosedHost] = field(default_factory=dict)
    """By name, in a full snapshot of a backend that knows of its hosts."""

    def part(self, only: Collection[Slug]) -> Snapshot:
        """What a full snapshot shows of these devices."""
        slugs = frozenset(only)
        found = {slug: some for slug, some in self.placements.items() if slug in slugs}
        return Snapshot(found, self.index, slugs)


def by_device(placements: Iterable[Placement]) -> dict[Slug, tuple[Placement, ...]]:
    """The placements of each device, in the order of their epochs and ages."""
    found: dict[Slug, list[Placement]] = defaultdict(list)
    for one in placements:
        found[one.slug].append(one)
    return {
        slug: tuple(sorted(some, key=lambda one: (one.epoch, one.created_at, one.ref)))
        for slug, some in found.items()
    }


@dataclass(frozen=True, slots=True)
class Hint:
    """Something may have changed: look again. `slugs` None = resync: events were or may have been
    missed (a gap, a silence, a restart, a new connection), so everything must be looked at."""

    slugs: frozenset[Slug] | None
    index: int = 0
    calm: bool = False
    """It only confirms what was asked for (placed, runs): nothing that wants an action soon."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Whether more placements make sense now (back-pressure)."""

    room: bool
    reason: str = ""
    full: Mapping[str, str] = field(default_factory=dict)
    """Where a fleet has several schedulers: those without room, and why; there is room in the others."""

    @classmethod
    def beside(cls, reasons: Collection[str], limit: int) -> Capacity:
        """No room while `limit` agents or more wait for a node. `reasons`: why each of them waits."""
        if len(reasons) < limit:
            return cls(room=True)
        return cls(room=False, reason=f"{waiting(reasons)}; starts go on below {limit}")


def waiting(reasons: Collection[str]) -> str:
    """How many agents wait for a node, and the most common reason, in the scheduler's words; "" = none waits."""
    if not reasons:
        return ""
    count = "1 agent waits" if len(reasons) == 1 else f"{len(reasons)} agents wait"
    ((most, _),) = Counter(reasons).most_common(1)
    return f"{count} for a node: {most}"


class Scheduler(Protocol):
    """Runs agents. Every method raises TransientError (try again), TerminalError/DeniedError (refused
    for good) or UserError (the template or a setting is wrong); never anything of the client library.
    """

    name: str
    capabilities: Capabilities

    async def prepare(
        self, specs: Collection[AgentSpec], *, shards: Collection[Shard] | None = None
    ) -> Mapping[str, str]:
        """Make ready to place these specs (register parent jobs, check templates). Idempotent; the
        last call's specs are those that exist. Returns agent class → why it can't be prepared, for a
        template that won't do, say; the other classes are ready.

        `shards`: what is shared by all replicas is written only where it is of one of these shards, so that
        the holders of different shards never write the same; None = of all."""
        ...

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        """Make the placement (record.slug, epoch) exist. Idempotent: twice, or raced from two
        processes, still ends with one. Returns an index: a `snapshot` with at least that index shows
        the placement. If it does not (a phantom answer), call ensure again with the same epoch."""
        ...

    async def retire(self, placement: Placement, grace_s: float) -> None:
        """Graceful stop (SIGTERM, SIGKILL after about grace_s), then gone. Idempotent; something gone
        already is success. Returns when the stop is accepted; a snapshot tells when it is DEAD."""
        ...

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        """All placements of this installation, or those of the given slugs (cheap for a few); an
        error rather than a silent partial."""
        ...

    def watch(self) -> AsyncIterator[Hint]:
        """Hints until the iterator is closed; the first one is a resync. Never raises for a lost
        connection: it reconnects with jittered back-off and says resync."""
        ...

    async def capacity(self) -> Capacity:
        """Whether the backend can place more now (blocked evaluations, say)."""
        ...

    async def sweep(self, dead: Collection[Placement]) -> int:
        """Forget some dead placements (purge), slowly; never one with a process left. Returns how many."""
        ...

    async def close(self) -> None:
        """Release connections. Running agents are left alone."""
        ...


async def unchanged_since(scheduler: Scheduler, snapshot: Snapshot) -> bool:
    """Whether a full snapshot that is begun now would equal this one, without reading one. False when in doubt,
    and for a backend without a method `unchanged_since`. Raises as `Scheduler.snapshot`."""
    probe = getattr(scheduler, "unchanged_since", None)
    return probe is not None and bool(await probe(snapshot))


def check_spec(backend: str, spec: AgentSpec) -> None:
    """What a backend can tell of a spec without its servers: its method `check_spec`, where it has one.
    Raises UserError."""
    check = getattr(load(backend), "check_spec", None)
    if check is not None:
        check(spec)


def load(name: str) -> Any:
    """The class registered under name in the entry-point group; it is called with keyword settings.

    Raises UserError naming those that are installed.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise UserError(f"no scheduler backend {name!r}; installed are: {', '.join(sorted(found))}")
    return found[name].load()
