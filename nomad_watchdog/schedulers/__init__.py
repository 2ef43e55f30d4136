"""The scheduler interface: small, level-triggered, the same for every backend.

A backend is found by its name in the entry-point group ``nomad_watchdog.schedulers``, built-in and third-party ones
alike. `nomad_watchdog.testing.conformance` is the contract as a test suite, which third parties run unchanged.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Final, Protocol

from nomad_watchdog.errors import UserError
from nomad_watchdog.host_pressure import HostUsage
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
    steers: bool = False
    """`ensure` makes the scheduler prefer hosts that are not in `AgentSpec.avoid`."""


@dataclass(frozen=True, slots=True)
class ClosedHost:
    """A host on which an operator has stopped the placement of new agents."""

    draining: bool
    """Its agents are to move to other hosts. False: it is only ineligible, and its agents stay."""
    state: str
    """Short text for people, such as "draining until 2026-11-30T05:00:00Z"."""
    nodes: Mapping[str, bool] = field(default_factory=dict)
    """Where several nodes can have one name: the IDs of those of this name that are closed, and whether each is being
    drained. Empty = the name is unique."""
    is_last: bool = False
    """No host of its scheduler takes agents now."""
    cordoned: bool = False
    """Only cordoned, as by `kubectl cordon`. Its agents stay, unless the settings say that they leave."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Placements of this installation at one index, including dead ones that the backend still lists.

    `only`: the requested slugs, None = all. A snapshot is complete for these: a slug without an entry has no
    placement.
    """

    placements: Mapping[Slug, tuple[Placement, ...]]
    index: int
    only: frozenset[Slug] | None = None
    behind: frozenset[Slug] = frozenset()
    """Devices whose placements may be older than `index`: read them again."""
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
    """Something may have changed, so read these devices. `slugs`: None = resync, read all devices, because events may
    have been missed (a gap, a timeout, a restart, a new connection)."""

    slugs: frozenset[Slug] | None
    index: int = 0
    calm: bool = False
    """It only confirms what was requested (placed, running), so no action is urgent."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Whether more placements make sense now (back-pressure)."""

    room: bool
    reason: str = ""
    full: Mapping[str, str] = field(default_factory=dict)
    """For a fleet on several schedulers: those without room, and why. The others have room."""

    @classmethod
    def beside(cls, reasons: Collection[str], limit: int) -> Capacity:
        """No room while at least `limit` agents wait for a node. `reasons`: why each of them waits."""
        if len(reasons) < limit:
            return cls(room=True)
        return cls(room=False, reason=f"{waiting(reasons)}; starts continue below {limit}")


def waiting(reasons: Collection[str]) -> str:
    """The number of agents that wait for a node, and the most common reason, as the scheduler reports it; "" = none."""
    if not reasons:
        return ""
    count = "1 agent waits" if len(reasons) == 1 else f"{len(reasons)} agents wait"
    ((most, _),) = Counter(reasons).most_common(1)
    return f"{count} for a node: {most}"


class Scheduler(Protocol):
    """Runs agents. Every method raises TransientError (retry), TerminalError or DeniedError (refused permanently) or
    UserError (the template or a setting is wrong), and no errors of a client library.
    """

    name: str
    capabilities: Capabilities

    async def prepare(
        self,
        specs: Collection[AgentSpec],
        *,
        shards: Collection[Shard] | None = None,
        trials: Collection[AgentSpec] = (),
    ) -> Mapping[str, str]:
        """Prepare to place these specs (register parent jobs, check templates). Idempotent; the specs of the last
        call replace earlier ones. Returns agent class → why it cannot be prepared (for example, an invalid
        template). The other classes are ready.

        `trials`: at most one more spec for each class, which a roll-out in steps tries on some of its devices. In the
        answer its hash stands for it. Callers omit the argument if there is none.

        `shards`: write objects that all replicas share only for these shards, so that the holders of different
        shards never write the same object; None = all shards."""
        ...

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        """Create the placement (record.slug, epoch) unless it exists. Idempotent: two calls, also from two
        processes at the same time, result in one placement. Returns an index: a `snapshot` with at least that index
        includes the placement. If it does not (after a wrong answer), call ensure again with the same epoch."""
        ...

    async def retire(self, placement: Placement, grace_s: float) -> None:
        """Stop gracefully (SIGTERM, SIGKILL after about grace_s). Idempotent; a placement that no longer exists is
        success. Returns when the stop is accepted; a snapshot shows when the placement is DEAD."""
        ...

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        """All placements of this installation, or those of the given slugs (cheap for a few). Raises an error instead
        of returning an incomplete snapshot."""
        ...

    def watch(self) -> AsyncIterator[Hint]:
        """Hints until the iterator is closed; the first one is a resync. A lost connection raises no error: it is
        opened again with jittered back-off, and the next hint is a resync."""
        ...

    async def capacity(self) -> Capacity:
        """Whether the backend can place more agents now. For example, blocked evaluations mean that it cannot."""
        ...

    async def sweep(self, dead: Collection[Placement]) -> int:
        """Delete some dead placements, but none with a running process. Returns their number."""
        ...

    async def close(self) -> None:
        """Release connections. Agents keep running."""
        ...


def named(
    specs: Iterable[AgentSpec], trials: Iterable[AgentSpec]
) -> Iterator[tuple[str, AgentSpec]]:
    """All specs, each with the name that the answer of `Scheduler.prepare` uses for it."""
    yield from ((spec.agent_class, spec) for spec in specs)
    yield from ((spec.spec_hash, spec) for spec in trials)


async def unchanged_since(scheduler: Scheduler, snapshot: Snapshot) -> bool:
    """Whether a full snapshot that is begun now would equal this one, without reading one. False when in doubt,
    and for a backend without a method `unchanged_since`. Raises as `Scheduler.snapshot`."""
    probe = getattr(scheduler, "unchanged_since", None)
    return probe is not None and bool(await probe(snapshot))


async def open_hosts(scheduler: Scheduler) -> frozenset[str] | None:
    """The names of the hosts that take new agents, including those without any; None = not known, as for a backend
    without a method `open_hosts`. Raises as `Scheduler.snapshot`."""
    read = getattr(scheduler, "open_hosts", None)
    return None if read is None else await read()


async def host_usage(scheduler: Scheduler, hosts: Collection[str]) -> Mapping[str, HostUsage]:
    """The use of these hosts by the scheduler's statistics, which a backend with a method `host_usage` has. Hosts that it
    has none of are left out. Raises as `Scheduler.snapshot`."""
    read = getattr(scheduler, "host_usage", None)
    return {} if read is None else await read(hosts)


def check_spec(backend: str, spec: AgentSpec) -> None:
    """Check a spec without the servers of the backend, with its method `check_spec` if it has one. Raises UserError."""
    check = getattr(load(backend), "check_spec", None)
    if check is not None:
        check(spec)


def load(name: str) -> Any:
    """The class registered under this name in the entry-point group. Its constructor takes settings as keywords.

    Raises UserError that names the installed backends.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise UserError(f"no scheduler backend {name!r}; installed are: {', '.join(sorted(found))}")
    return found[name].load()
