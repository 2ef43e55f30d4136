"""The API's answers as the commands use them. `parse` checks that an answer has this form.

A field that an older service does not send is in a class with `total=False`. Answers have more fields than these.
"""

from functools import cache
from types import UnionType
from typing import Any, TypedDict, TypeVar, cast, get_args, get_origin, get_type_hints, is_typeddict

T = TypeVar("T")
Fields = dict[str, object]
"""An answer, or a part of one, whose fields are printed without being known."""


class Page(TypedDict):
    items: list[Fields]


class NextPage(Page, total=False):
    next: str | None
    """The cursor of the following page."""


class EventPage(Page):
    next: int


class _Lease(TypedDict):
    shard: int
    holder: str
    api: str
    since: float
    term: int


class KnownLease(_Lease, total=False):
    last_known: str


class LeaseReplica(TypedDict):
    id: str
    api: str


class ConfiguredReplica(LeaseReplica, total=False):
    config: str


class LeasesAnswer(TypedDict):
    replica: str
    problem: str
    shards: list[KnownLease]
    replicas: list[ConfiguredReplica]


class Held(TypedDict):
    """What a breaker has put on hold."""

    count: int
    reason: str
    id: str


class HeldStops(Held):
    stops: list[Fields]


class StopPlan(TypedDict):
    """The part of a plan that is about held stops."""

    held: HeldStops


class HeldDepartures(Held):
    devices: list[Fields]


class Confirmed(TypedDict):
    confirmed: int


class _PlanHeld(TypedDict):
    count: int


class PlanHeld(_PlanHeld, total=False):
    reason: str
    id: str
    stops: list[Fields]


class Text(TypedDict):
    text: str


class _Plan(TypedDict):
    registry_index: int
    summary: str
    actions: list[Fields]
    waiting_rollout: int
    held: PlanHeld


class PlanAnswer(_Plan, total=False):
    waiting: list[str]
    rollouts: list[Text]
    staged: list[Text]
    inventory: list[Text]
    not_in_force: list[str]
    preparing: list[str]
    unprepared_classes: dict[str, str]
    unplaced: int
    specs: dict[str, str]
    outcomes: dict[str, int]


# The keys of the next classes are no Python names.
PauseTarget = TypedDict(
    "PauseTarget", {"class": str, "labels": dict[str, str], "devices": list[str]}
)


class PauseAnswer(PauseTarget):
    id: str
    window: bool
    active: bool
    covers: int
    begins: float
    ends: float | None
    by: str
    reason: str


class PausesAnswer(TypedDict):
    items: list[PauseAnswer]


MigrationState = TypedDict("MigrationState", {"from": str, "to": str, "state": str})


class MigrationAnswer(MigrationState):
    id: str
    back: bool
    by: str
    target: PauseTarget
    shards: list[int]
    devices: int
    there: int
    ready: int
    waiting: int
    ending: int


class MigrationsAnswer(TypedDict):
    items: list[MigrationAnswer]
    hint: str
    problem: str


class _MigrationBegun(MigrationState):
    id: str
    devices: int
    to_move: int


class MigrationBegun(_MigrationBegun, total=False):
    by_class: dict[str, int]
    by_shard: dict[str, int]


RolloutAnswer = TypedDict(
    "RolloutAnswer",
    {
        "class": str,
        "version": str,
        "proven": str,
        "state": str,
        "reason": str,
        "step": str,
        "devices": int,
        "on_version": int,
        "ok": int,
        "failed": int,
        "waiting": int,
        "next": str,
        "change": str,
    },
)
"""The roll-out of a class."""


class RolloutsAnswer(TypedDict):
    items: list[RolloutAnswer]
    problem: str


class PastRolloutAnswer(TypedDict):
    at: float
    version: str
    outcome: str
    by: str
    why: str


class PastRollouts(TypedDict):
    items: list[PastRolloutAnswer]


class RebalanceStateAnswer(TypedDict):
    state: str


class RebalanceAnswer(RebalanceStateAnswer):
    id: str
    reason: str
    by: str
    target: PauseTarget
    max: int
    moved: int
    on_way: int
    waiting: int


class _HostCount(TypedDict):
    host: str
    agents: int


class HostCount(_HostCount, total=False):
    after: int


class RebalancesAnswer(TypedDict):
    items: list[RebalanceAnswer]
    hosts: list[HostCount]
    problem: str


class RebalanceBegun(RebalanceStateAnswer):
    id: str
    to_move: int
    steers: bool
    hosts: list[HostCount]


class _Pool(TypedDict):
    name: str
    configured: bool
    count: int
    running: int
    problem: str


class PoolAnswer(_Pool, total=False):
    """A pool that is not configured any more has only the fields of `_Pool`."""

    min: int
    max: int
    scaler: str
    dry_run: bool
    metric: str
    target: float | None
    value: float | None
    reason: str


class PoolsAnswer(TypedDict):
    items: list[PoolAnswer]
    keeper: bool


class StallAnswer(TypedDict):
    avg10: float
    avg60: float


class _HostAnswer(TypedDict):
    host: str
    agents: int
    state: str
    pressure: dict[str, StallAnswer | None] | None
    age_s: float | None
    unreadable: str


class HostAnswer(_HostAnswer, total=False):
    usage: dict[str, float | None] | None


class HostsAnswer(TypedDict):
    items: list[HostAnswer]


class _ProbeAnswer(TypedDict):
    probe: str
    ok: bool
    took_s: float
    reason: str


class ProbeAnswer(_ProbeAnswer, total=False):
    outcome: str
    warning: str


class ProbeStarted(TypedDict):
    """The agent's own answer to `POST /probe`."""

    run: int


class ProbeRun(ProbeStarted):
    done: bool
    results: list[ProbeAnswer]


class AgentAnswer(TypedDict):
    id: str
    instance: str
    listen: str


class _BulkResult(TypedDict):
    status: int


class BulkItemAnswer(_BulkResult, total=False):
    error: str | None


class BulkAnswer(TypedDict):
    results: list[BulkItemAnswer]


def parse(value: object, shape: type[T]) -> T:
    """The value, checked to have this form. Raises ValueError with the place that has not."""
    _check(value, shape, "")
    return cast("T", value)


def _check(value: object, wanted: Any, place: str) -> None:
    if is_typeddict(wanted):
        _check_fields(value, wanted, place)
        return
    kind = get_origin(wanted)
    if kind in (list, dict) and isinstance(value, kind):
        inner = get_args(wanted)[-1]
        for one in value.values() if isinstance(value, dict) else value:
            _check(one, inner, place)
    elif not isinstance(value, _plain(wanted)):
        raise ValueError(f"{place} has a wrong type")


def _check_fields(value: object, shape: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place or 'the answer'} is not an object")  # noqa: TRY004  # data
    for name, (wanted, required) in _fields(shape).items():
        where = f"{place}.{name}" if place else name
        if name in value:
            _check(value[name], wanted, where)
        elif required:
            raise ValueError(f"{where} is missing")


@cache
def _fields(shape: Any) -> dict[str, tuple[Any, bool]]:
    """The fields of a TypedDict: the type of each, and whether it is required."""
    return {
        name: (inner, name in shape.__required_keys__)
        for name, inner in get_type_hints(shape).items()
    }


@cache
def _plain(wanted: Any) -> tuple[type, ...]:
    """The types for isinstance. JSON has one kind of number."""
    parts = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    kinds = {get_origin(one) or one for one in parts}
    return tuple(kinds | {int} if float in kinds else kinds)
