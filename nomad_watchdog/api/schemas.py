"""What may come in and what goes out. Pydantic ends here: behind the door are the values of `model`."""

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
    printable,
)
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import MAX_ID_BYTES, DeviceId, slug_of
from nomad_watchdog.model import AgentState, Epoch, RepairAttempt, Repairs, Report

MAX_HEARD: Final = 500
"""Reports that one replica tells another at once."""
MAX_BULK: Final = 5_000
MAX_HEARTBEATS: Final = 10_000
MAX_PAUSED: Final = 200
"""Device ids in one pause: the document that holds all pauses is small. More are a class or labels."""
REASON_CHARS: Final = 512
_BIG: Final = 2**53


def _listen(text: str) -> str:
    try:
        if text.startswith(":"):  # every address of its machine
            endpoint(f"0.0.0.0{text}")  # noqa: S104  # not listened on
            return text
        return endpoint(text) if text else text
    except UserError as error:
        raise ValueError(str(error)) from error


def _tame(text: str) -> str:
    # What an agent says of its device is shown, so it is made harmless rather than lost.
    cut = text[:REASON_CHARS]
    return cut if cut.isprintable() else "".join(c if c.isprintable() else "�" for c in cut)


Count = Annotated[int, Field(ge=0, le=_BIG)]


class BulkIn(Strict):
    """Up to 5,000 wishes at once; each item is checked and answered by itself."""

    devices: list[DeviceItem] = Field(default_factory=list, max_length=MAX_BULK)
    delete: list[Id] = Field(default_factory=list, max_length=MAX_BULK)


class BulkEnvelope(Strict):
    """A BulkIn whose items are not looked at yet."""

    devices: list[object] = Field(default_factory=list, max_length=MAX_BULK)
    delete: list[object] = Field(default_factory=list, max_length=MAX_BULK)


class WebhookDevice(Strict):
    """A device in an event; a disconnect needs the id only."""

    id: Id
    agent_class: Name = Field("default", alias="class")
    address: Annotated[str, Field(max_length=ADDRESS_CHARS)] | None = None
    """Checked when it connects: a device must be able to leave whatever is wrong with its address."""
    labels: Labels = Field(default_factory=dict)
    ttl: Ttl | None = None


class WebhookIn(Strict):
    """What a gateway sends when a device comes or goes."""

    event: Literal["connected", "disconnected"]
    device: WebhookDevice


class HeartbeatsIn(Strict):
    """Signs of life of many devices."""

    ids: list[Annotated[str, Field(max_length=MAX_ID_BYTES)]] = Field(max_length=MAX_HEARTBEATS)


BACKEND: Final = r"^[a-z][a-z0-9_-]{0,63}$"


class TargetIn(Strict):
    """Which devices: all that is given must match, and something must be given."""

    devices: list[Id] = Field(default_factory=list, max_length=MAX_PAUSED)
    agent_class: Name | None = Field(None, alias="class")
    labels: Labels = Field(default_factory=dict)

    @model_validator(mode="after")
    def _meant(self) -> Self:
        if not (self.devices or self.agent_class or self.labels):
            raise ValueError("name devices, a class or labels; an empty target would mean nothing")
        return self

    def target(self) -> Target:
        """As the value that goes inside."""
        return Target(frozenset(self.devices), self.agent_class or "", dict(self.labels))


class PauseIn(TargetIn):
    """A pause, from now or from `from`, with an end (`for` or `until`) or until it is resumed."""

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
            raise ValueError("a maintenance window needs an end: for or until")
        return self


class MigrateIn(Strict):
    """Which devices' agents move from one scheduler to another: all, or those that match all that is given."""

    source: Annotated[str, Field(alias="from", pattern=BACKEND)]
    goal: Annotated[str, Field(alias="to", pattern=BACKEND)]
    devices: list[Id] = Field(default_factory=list, max_length=MAX_PAUSED)
    agent_class: Name | None = Field(None, alias="class")
    labels: Labels = Field(default_factory=dict)
    shards: list[Annotated[int, Field(ge=0, le=255)]] = Field(default_factory=list, max_length=256)
    at_once: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0, description="so many devices may be on their way; 0 = as many as a roll-out may replace"
    )
    by: Annotated[str, Field(max_length=64), AfterValidator(printable)] = ""
    dry_run: bool = Field(False, description="only say what would move")

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


class ConfirmIn(Strict):
    """Which held stops are meant: `held.id` of the plan that was looked at."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class PoolScaleIn(Strict):
    """How many workers a pool is to have."""

    count: Annotated[int, Field(ge=0, le=MAX_WORKERS)]


class RepairAttemptIn(BaseModel):
    """One attempt of a ladder (watchdog_agent.wire)."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    number: Count = 0
    step: Annotated[str, AfterValidator(_tame)]
    outcome: Annotated[str, Field(max_length=32, pattern=r"^[a-z][a-z ]*$")]
    reason: Annotated[str, AfterValidator(_tame)] = ""
    age_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class RepairsIn(BaseModel):
    """What an agent with a ladder says of it."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    active: Annotated[str, AfterValidator(_tame)] = ""
    exhausted: bool = False
    dry_run: bool = False
    attempts: Annotated[list[RepairAttemptIn], Field(max_length=32)] = Field(default_factory=list)

    def repairs(self) -> Repairs:
        """As the value that goes inside."""
        attempts = tuple(RepairAttempt(**one.model_dump()) for one in self.attempts)
        return Repairs(self.active, self.exhausted, self.dry_run, attempts)


MAX_REPORT: Final = 64 * 1024
"""Bytes of an agent's report; those of our agent have at most a few thousand."""
MAX_AGE_S: Final = 10 * 365 * 86_400.0
"""Of the state of an agent, seconds."""
MAX_STATE: Final = 32
"""Characters of a state that only a newer agent knows."""
_STATES: Final = frozenset(AgentState)


def _known_state(state: object) -> object:
    """An agent that is newer than we are may know more kinds of trouble."""
    if not isinstance(state, str) or len(state) > MAX_STATE:
        return state
    return AgentState(state) if state in _STATES else AgentState.SUSPECT


class ReportIn(BaseModel):
    """A report of an agent (watchdog_agent.wire, version 1). Unknown fields are let through: during
    an upgrade agents may be newer than we are."""

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
    reason: Annotated[str, AfterValidator(_tame)] = ""
    listen: Annotated[str, Field(max_length=300), AfterValidator(_listen)] = ""
    dropped: Count = 0
    stopping: bool = False
    repairs: RepairsIn | None = None
    gateway: Annotated[str, Field(max_length=ADDRESS_CHARS), AfterValidator(printable)] = ""
    gateway_dead: bool = False
    state_age_s: Annotated[float, Field(ge=0, le=MAX_AGE_S, allow_inf_nan=False)] = 0.0

    def report(self) -> Report:
        """As the value that goes inside."""
        device_id = DeviceId(self.device_id)
        return Report(
            slug=slug_of(device_id),
            device_id=device_id,
            epoch=Epoch(self.epoch),
            repairs=None if self.repairs is None else self.repairs.repairs(),
            **self.model_dump(exclude={"v", "device_id", "epoch", "agent_class", "repairs"}),
        )


class ReplicatedReportsIn(BaseModel):
    """Reports that another replica has accepted."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    reports: Annotated[list[ReportIn], Field(max_length=MAX_HEARD)]
    beats: list[Annotated[str, Field(max_length=MAX_ID_BYTES)]] = Field(
        default_factory=list, max_length=MAX_HEARTBEATS, description="devices that it heard"
    )


class EventsIn(BaseModel):
    """Events that another replica alone has seen, as it shows them."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    events: Annotated[list[dict[str, object]], Field(max_length=MAX_HEARD)]


class DeviceOut(BaseModel):
    """One device as it is now."""

    id: str
    slug: str
    agent_class: str = Field(alias="class")
    address: str
    labels: dict[str, str]
    presence: str
    generation: int
    epoch: int
    verdict: str
    reason: str
    since_s: float
    node: str
    version: str
    agent_age_s: float | None
    placement_state: str | None
    instance: str
    source: str
    ttl: str | None
    expires_in_s: float | None
    left: str | None
    flapping: bool
    paused: str | None


class DevicePage(BaseModel):
    """A page of devices; `next` is the cursor of the following one, null at the end."""

    items: list[DeviceOut]
    next: str | None
    index: int


class DeviceChange(BaseModel):
    """What a write did: durable when it is answered."""

    id: str
    slug: str
    changed: bool
    generation: int
    epoch: int
    presence: str
    duplicate: bool = False
    """The event was applied before; this call had no effect."""


class BulkResult(BaseModel):
    """The answer to one item of a bulk request."""

    id: str | None
    action: Literal["put", "delete"]
    index: int = Field(description="place in the list `devices` or `delete` of the request, from 0")
    status: int
    changed: bool = False
    error: str | None = None


class BulkOut(BaseModel):
    """Results in the order of the request: devices, then delete."""

    results: list[BulkResult]


class ErrorBody(BaseModel):
    """What is wrong."""

    code: str
    message: str


class ErrorOut(BaseModel):
    """Every answer of 400 and above."""

    error: ErrorBody


class AnyOut(BaseModel):
    """An object whose fields grow."""

    model_config = ConfigDict(extra="allow")
