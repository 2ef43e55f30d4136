"""The bodies of requests and responses. Handlers convert them to the values of `model`."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from nomad_watchdog.api.pressure_schema import HostPressureIn
from nomad_watchdog.config.pools import MAX_WORKERS
from nomad_watchdog.core.pauses import Target
from nomad_watchdog.device_address import endpoint
from nomad_watchdog.device_fields import (
    ADDRESS_CHARS,
    DeviceItem,
    Duration,
    Id,
    Labels,
    Name,
    Strict,
    Ttl,
    examples,
    printable,
)
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import MAX_ID_BYTES, DeviceId, slug_of
from nomad_watchdog.model import AgentState, Epoch, RepairAttempt, Repairs, Report

MAX_REPLICATED: Final = 500
"""Maximum number of reports or events in one request of a replica."""
MAX_BULK: Final = 5_000
MAX_HEARTBEATS: Final = 10_000
MAX_PAUSED: Final = 200
"""Maximum number of device ids in one pause, because one document contains all pauses. Use a class or labels for more."""
REASON_CHARS: Final = 512
_BIG: Final = 2**53


def _listen(text: str) -> str:
    try:
        if text.startswith(":"):  # all addresses of the machine
            endpoint(f"0.0.0.0{text}")  # noqa: S104  # not listened on
            return text
        return endpoint(text) if text else text
    except UserError as error:
        raise ValueError(str(error)) from error


def _sanitised(text: str) -> str:
    # The text of an agent is displayed: it is sanitised, so that its report is not lost.
    cut = text[:REASON_CHARS]
    return cut if cut.isprintable() else "".join(c if c.isprintable() else "�" for c in cut)


Count = Annotated[int, Field(ge=0, le=_BIG)]


class BulkIn(Strict):
    """Up to 5,000 changes; each item is checked separately and has a result."""

    devices: list[DeviceItem] = Field(default_factory=list, max_length=MAX_BULK)
    delete: list[Id] = Field(default_factory=list, max_length=MAX_BULK)


class BulkEnvelope(Strict):
    """A BulkIn whose items were not checked yet."""

    devices: list[object] = Field(default_factory=list, max_length=MAX_BULK)
    delete: list[object] = Field(default_factory=list, max_length=MAX_BULK)


class WebhookDevice(Strict):
    """A device in an event; a disconnect needs only the id."""

    id: Id
    agent_class: Name = Field("default", alias="class")
    address: Annotated[str, Field(max_length=ADDRESS_CHARS)] | None = None
    """Checked when the device connects. It can leave even if its address is invalid."""
    labels: Labels = Field(default_factory=dict)
    ttl: Ttl | None = None


class WebhookIn(Strict):
    """The event of a gateway when a device connects or disconnects."""

    model_config = examples(
        {"event": "connected", "device": {"id": "cam-1", "address": "10.0.0.7"}},
        {"event": "disconnected", "device": {"id": "cam-1"}},
    )

    event: Literal["connected", "disconnected"]
    device: WebhookDevice


class HeartbeatsIn(Strict):
    """Heartbeats of many devices."""

    ids: list[Annotated[str, Field(max_length=MAX_ID_BYTES)]] = Field(max_length=MAX_HEARTBEATS)


BACKEND: Final = r"^[a-z][a-z0-9_-]{0,63}$"


class TargetIn(Strict):
    """Which devices. A device must match all conditions, and at least one is required."""

    devices: list[Id] = Field(default_factory=list, max_length=MAX_PAUSED)
    agent_class: Name | None = Field(None, alias="class")
    labels: Labels = Field(default_factory=dict)

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not (self.devices or self.agent_class or self.labels):
            raise ValueError("name devices, a class or labels")
        return self

    def target(self) -> Target:
        """As `core.pauses.Target`."""
        return Target(frozenset(self.devices), self.agent_class or "", dict(self.labels))


class PauseIn(TargetIn):
    """A pause, from now or from `from`, with an end (`for` or `until`) or until it is resumed."""

    model_config = examples({"devices": ["cam-1"], "for": "2h", "reason": "new power supply"})

    begins: AwareDatetime | None = Field(None, alias="from")
    until: AwareDatetime | None = None
    lasts: Duration | None = Field(None, alias="for")
    reason: Annotated[str, Field(max_length=256), AfterValidator(printable)] = ""
    by: Annotated[str, Field(max_length=64), AfterValidator(printable)] = ""
    window: bool = Field(
        False, description="a maintenance window: has an end, is removed by its id"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.until is not None and self.lasts is not None:
            raise ValueError("give for or until, not both")
        if self.window and self.until is None and self.lasts is None:
            raise ValueError("a maintenance window requires an end: for or until")
        return self


class MigrateIn(Strict):
    """Which agents move from one scheduler to another: all, or those of the devices that match all conditions."""

    model_config = examples({"from": "nomad", "to": "kubernetes", "labels": {"site": "north"}})

    source: Annotated[str, Field(alias="from", pattern=BACKEND)]
    goal: Annotated[str, Field(alias="to", pattern=BACKEND)]
    devices: list[Id] = Field(default_factory=list, max_length=MAX_PAUSED)
    agent_class: Name | None = Field(None, alias="class")
    labels: Labels = Field(default_factory=dict)
    shards: list[Annotated[int, Field(ge=0, le=255)]] = Field(default_factory=list, max_length=256)
    at_once: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0, description="maximum number of moves in progress; 0 = as many as a roll-out may replace"
    )
    by: Annotated[str, Field(max_length=64), AfterValidator(printable)] = ""
    dry_run: bool = Field(False, description="only report what would move")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.source == self.goal:
            raise ValueError("from and to are the same")
        return self

    def target(self) -> Target | None:
        """Which devices; None = all."""
        if not (self.devices or self.agent_class or self.labels):
            return None
        return Target(frozenset(self.devices), self.agent_class or "", dict(self.labels))


class RebalanceIn(Strict):
    """Which agents may move to hosts with fewer agents: all, or those of the devices that match all conditions."""

    agent_class: Name | None = Field(None, alias="class")
    labels: Labels = Field(default_factory=dict)
    most: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0, alias="max", description="maximum number of devices to move; 0 = as many as needed"
    )
    by: Annotated[str, Field(max_length=64), AfterValidator(printable)] = ""
    dry_run: bool = Field(False, description="only report what would move")

    def target(self) -> Target | None:
        """Which devices; None = all."""
        if not (self.agent_class or self.labels):
            return None
        return Target(agent_class=self.agent_class or "", labels=dict(self.labels))


class ConfirmIn(Strict):
    """Which held stops or departures are approved: `held.id` of the plan."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class PoolScaleIn(Strict):
    """The number of workers of a pool."""

    count: Annotated[int, Field(ge=0, le=MAX_WORKERS)]


class RepairAttemptIn(BaseModel):
    """One attempt of a ladder (watchdog_agent.wire)."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    number: Count = 0
    step: Annotated[str, AfterValidator(_sanitised)]
    outcome: Annotated[str, Field(max_length=32, pattern=r"^[a-z][a-z ]*$")]
    reason: Annotated[str, AfterValidator(_sanitised)] = ""
    age_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class RepairsIn(BaseModel):
    """The repair ladder of an agent."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    active: Annotated[str, AfterValidator(_sanitised)] = ""
    exhausted: bool = False
    dry_run: bool = False
    attempts: Annotated[list[RepairAttemptIn], Field(max_length=32)] = Field(default_factory=list)

    def repairs(self) -> Repairs:
        """As `model.Repairs`."""
        attempts = tuple(RepairAttempt(**one.model_dump()) for one in self.attempts)
        return Repairs(self.active, self.exhausted, self.dry_run, attempts)


MAX_REPORT: Final = 64 * 1024
"""Maximum bytes of a report; those of our agent have a few thousand."""
MAX_AGE_S: Final = 10 * 365 * 86_400.0
"""Maximum age of the state of an agent, seconds."""
MAX_STATE: Final = 32
"""Maximum characters of a state, also of one that only newer agents know."""
_STATES: Final = frozenset(AgentState)


def _known_state(state: object) -> object:
    """Unknown states of a newer agent become `suspect`."""
    if not isinstance(state, str) or len(state) > MAX_STATE:
        return state
    return AgentState(state) if state in _STATES else AgentState.SUSPECT


_CONVERTED: Final = {"v", "device_id", "epoch", "agent_class", "repairs", "pressure"}


class ReportIn(BaseModel):
    """A report of an agent (watchdog_agent.wire, version 1). Unknown fields are ignored: during an upgrade agents may
    be newer than the control plane."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    v: Literal[1]
    device_id: Id
    epoch: Count
    instance: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(printable)]
    sequence: Count
    agent_class: Annotated[str, Field(max_length=64)] = ""
    version: Annotated[str, Field(max_length=64), AfterValidator(printable)] = ""
    ready: bool
    state: Annotated[AgentState, BeforeValidator(_known_state)]
    was_ready: bool
    misses: Count
    confirmed: bool
    reason: Annotated[str, AfterValidator(_sanitised)] = ""
    listen: Annotated[str, Field(max_length=300), AfterValidator(_listen)] = ""
    dropped: Count = 0
    stopping: bool = False
    repairs: RepairsIn | None = None
    gateway: Annotated[str, Field(max_length=ADDRESS_CHARS), AfterValidator(printable)] = ""
    gateway_dead: bool = False
    state_age_s: Annotated[float, Field(ge=0, le=MAX_AGE_S, allow_inf_nan=False)] = 0.0
    pressure: HostPressureIn | None = None

    def report(self) -> Report:
        """As `Report`."""
        device_id = DeviceId(self.device_id)
        return Report(
            slug=slug_of(device_id),
            device_id=device_id,
            epoch=Epoch(self.epoch),
            repairs=None if self.repairs is None else self.repairs.repairs(),
            pressure=None if self.pressure is None else self.pressure.pressure(),
            **self.model_dump(exclude=_CONVERTED),
        )


class ReplicatedReportsIn(BaseModel):
    """Reports that another replica has accepted."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    reports: Annotated[list[ReportIn], Field(max_length=MAX_REPLICATED)]
    beats: list[Annotated[str, Field(max_length=MAX_ID_BYTES)]] = Field(
        default_factory=list,
        max_length=MAX_HEARTBEATS,
        description="devices whose heartbeats it received",
    )


class EventsIn(BaseModel):
    """Events that only another replica has observed, in the form of its API."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    events: Annotated[list[dict[str, object]], Field(max_length=MAX_REPLICATED)]
