"""What may come in and what goes out. Pydantic ends here: behind the door are the values of `model`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from aiohttp import web
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from nomad_watchdog.api.acceptor import place_of
from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.body_memory import MOST_UNSIGNED
from nomad_watchdog.api.connection_limits import Rank
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.config.hcl import parse_duration
from nomad_watchdog.config.pools import MOST_WORKERS
from nomad_watchdog.config.problems import in_body
from nomad_watchdog.core.pauses import Target
from nomad_watchdog.device_address import device_address, endpoint
from nomad_watchdog.errors import UserError
from nomad_watchdog.fleet.fleet import AgentReport
from nomad_watchdog.ids import MAX_ID_BYTES, DeviceId, parse_device_id, slug_of
from nomad_watchdog.model import AgentState, Device, Epoch, RepairAttempt, Repairs

MOST_LABELS: Final = 32
LABEL_BYTES: Final = 128
ADDRESS_CHARS: Final = 255
"""Longest host name (RFC 1035), with a dot at the end, or in brackets."""
MOST_HEARD: Final = 500
"""Reports that one replica tells another at once."""
MOST_BULK: Final = 5_000
MOST_HEARTBEATS: Final = 10_000
MOST_PAUSED: Final = 200
"""Device ids in one pause: the document that holds all pauses is small. More are a class or labels."""
REASON_CHARS: Final = 512
BODY_TIMEOUT_S: Final = 20.0
"""A body must be complete in so long: a slow sender holds no handler."""
_BIG: Final = 2**53

Model = TypeVar("Model", bound=BaseModel)


def _id(text: str) -> str:
    try:
        return parse_device_id(text)
    except UserError as error:
        raise ValueError(str(error)) from error


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{ascii(text)[:80]} holds an unprintable character")
    return text


def _address(text: str) -> str:
    try:
        return device_address(text)
    except UserError as error:
        raise ValueError(str(error)) from error


def _listen(text: str) -> str:
    try:
        if text.startswith(":"):  # every address of its machine
            endpoint(f"0.0.0.0{text}")  # noqa: S104  # not listened on
            return text
        return endpoint(text) if text else text
    except UserError as error:
        raise ValueError(str(error)) from error


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        for text in (key, value):
            _printable(text)
            size = len(text.encode())
            if size > LABEL_BYTES:
                raise ValueError(
                    f"label text {ascii(text)[:40]}… is {size} bytes long; at most {LABEL_BYTES} are allowed"
                )
        if not key:
            raise ValueError("a label's key must not be empty")
    return labels


def _duration(text: str) -> str:
    if parse_duration(text) <= 0:
        raise ValueError("a duration of more than 0 is allowed")
    return text


def _ttl(text: str) -> str:
    if 0 < parse_duration(text) < 1:
        raise ValueError("ttl must be 0s (for ever) or at least 1s")
    return text


def _tame(text: str) -> str:
    # What an agent says of its device is shown, so it is made harmless rather than lost.
    cut = text[:REASON_CHARS]
    return cut if cut.isprintable() else "".join(c if c.isprintable() else "�" for c in cut)


Id = Annotated[str, Field(description=f"1 to {MAX_ID_BYTES} bytes"), AfterValidator(_id)]
Name = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Address = Annotated[
    str,
    Field(
        min_length=1,
        max_length=ADDRESS_CHARS,
        description="host name, IPv4 or IPv6 address, without scheme, port or path",
    ),
    AfterValidator(_address),
]
Labels = Annotated[dict[str, str], Field(max_length=MOST_LABELS), AfterValidator(_labels)]
Ttl = Annotated[str, Field(max_length=32), AfterValidator(_ttl)]
Duration = Annotated[str, Field(max_length=32), AfterValidator(_duration)]
Count = Annotated[int, Field(ge=0, le=_BIG)]


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


class DeviceIn(_In):
    """The wish for one device, without its id."""

    agent_class: Name = Field("default", alias="class")
    address: Address
    labels: Labels = Field(default_factory=dict)
    ttl: Ttl | None = Field(None, description="a duration; 0s = for ever, null = as configured")

    @property
    def names_class(self) -> bool:
        """Whether the class was given, and is not the default for want of one."""
        return "agent_class" in self.model_fields_set

    def device(self, device_id: DeviceId) -> Device:
        """As the value that goes inside."""
        ttl_s = None if self.ttl is None else parse_duration(self.ttl)
        return Device(device_id, self.agent_class, self.address, dict(self.labels), ttl_s)


class DeviceItem(DeviceIn):
    """The wish for one device."""

    id: Id


class BulkIn(_In):
    """Up to 5,000 wishes at once; each item is checked and answered by itself."""

    devices: list[DeviceItem] = Field(default_factory=list, max_length=MOST_BULK)
    delete: list[Id] = Field(default_factory=list, max_length=MOST_BULK)


class BulkEnvelope(_In):
    """A BulkIn whose items are not looked at yet."""

    devices: list[Any] = Field(default_factory=list, max_length=MOST_BULK)
    delete: list[Any] = Field(default_factory=list, max_length=MOST_BULK)


class WebhookDevice(_In):
    """A device in an event; a disconnect needs the id only."""

    id: Id
    agent_class: Name = Field("default", alias="class")
    address: Annotated[str, Field(max_length=ADDRESS_CHARS)] | None = None
    """Checked when it connects: a device must be able to leave whatever is wrong with its address."""
    labels: Labels = Field(default_factory=dict)
    ttl: Ttl | None = None


class WebhookIn(_In):
    """What a gateway sends when a device comes or goes."""

    event: Literal["connected", "disconnected"]
    device: WebhookDevice


class HeartbeatsIn(_In):
    """Signs of life of many devices."""

    ids: list[Annotated[str, Field(max_length=MAX_ID_BYTES)]] = Field(max_length=MOST_HEARTBEATS)


BACKEND: Final = r"^[a-z][a-z0-9_-]{0,63}$"


class TargetIn(_In):
    """Which devices: all that is given must match, and something must be given."""

    devices: list[Id] = Field(default_factory=list, max_length=MOST_PAUSED)
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
    reason: Annotated[str, Field(max_length=256), AfterValidator(_printable)] = ""
    by: Annotated[str, Field(max_length=64), AfterValidator(_printable)] = ""
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


class MigrateIn(_In):
    """Which devices' agents move from one scheduler to another: all, or those that match all that is given."""

    source: Annotated[str, Field(alias="from", pattern=BACKEND)]
    goal: Annotated[str, Field(alias="to", pattern=BACKEND)]
    devices: list[Id] = Field(default_factory=list, max_length=MOST_PAUSED)
    agent_class: Name | None = Field(None, alias="class")
    labels: Labels = Field(default_factory=dict)
    shards: list[Annotated[int, Field(ge=0, le=255)]] = Field(default_factory=list, max_length=256)
    at_once: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0, description="so many devices may be on their way; 0 = as many as a roll-out may replace"
    )
    by: Annotated[str, Field(max_length=64), AfterValidator(_printable)] = ""
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


class ConfirmIn(_In):
    """Which held stops are meant: `held.id` of the plan that was looked at."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


class PoolScaleIn(_In):
    """How many workers a pool is to have."""

    count: Annotated[int, Field(ge=0, le=MOST_WORKERS)]


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


MOST_REPORT: Final = 64 * 1024
"""Bytes of an agent's report; those of our agent have at most a few thousand."""
MOST_AGE_S: Final = 10 * 365 * 86_400.0
"""Of the state of an agent, seconds."""
MOST_STATE: Final = 32
"""Characters of a state that only a newer agent knows."""
_STATES: Final = frozenset(AgentState)


def _known_state(state: object) -> object:
    """An agent that is newer than we are may know more kinds of trouble."""
    if not isinstance(state, str) or len(state) > MOST_STATE:
        return state
    return AgentState(state) if state in _STATES else AgentState.SUSPECT


class ReportIn(BaseModel):
    """A report of an agent (watchdog_agent.wire, version 1). Unknown fields are let through: during
    an upgrade agents may be newer than we are."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    v: Literal[1]
    device_id: Id
    epoch: Count
    instance: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
    sequence: Count
    agent_class: Annotated[str, Field(max_length=64)] = ""
    version: Annotated[str, Field(max_length=64), AfterValidator(_printable)] = ""
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
    gateway: Annotated[str, Field(max_length=ADDRESS_CHARS), AfterValidator(_printable)] = ""
    gateway_dead: bool = False
    state_age_s: Annotated[float, Field(ge=0, le=MOST_AGE_S, allow_inf_nan=False)] = 0.0

    def report(self) -> AgentReport:
        """As the value that goes inside."""
        device_id = DeviceId(self.device_id)
        return AgentReport(
            slug=slug_of(device_id),
            device_id=device_id,
            epoch=Epoch(self.epoch),
            repairs=None if self.repairs is None else self.repairs.repairs(),
            **self.model_dump(exclude={"v", "device_id", "epoch", "agent_class", "repairs"}),
        )


class HearsayIn(BaseModel):
    """Reports that another replica has accepted."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    reports: Annotated[list[ReportIn], Field(max_length=MOST_HEARD)]
    beats: list[Annotated[str, Field(max_length=MAX_ID_BYTES)]] = Field(
        default_factory=list, max_length=MOST_HEARTBEATS, description="devices that it heard"
    )


class EventsIn(BaseModel):
    """Events that another replica alone has seen, as it shows them."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    events: Annotated[list[dict[str, Any]], Field(max_length=MOST_HEARD)]


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


_AS_JSON: Final = {
    "a block { ... }": "an object { ... }",
    'a map such as { name = "value" }': 'an object such as {"name": "value"}',
}
"""What a configuration file calls otherwise."""


def problem(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with a body that should be this model, in words, without repeating what was sent at
    length."""
    found = error.errors(include_url=False)
    parts: list[str] = []
    for item in found[:5]:
        path, message = in_body(dict(item), model)
        for words, instead in _AS_JSON.items():
            message = message.replace(words, instead)
        where = ".".join(_printed(part) for part in path)
        parts.append(f"{where}: {message}" if where else message)
    more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
    return "; ".join(parts) + more


def _printed(part: object) -> str:
    text = str(part)[:64]
    return text if text.isprintable() else ascii(text)


async def read(request: web.Request, model: type[Model], most: int | None = None) -> Model:
    """The body, of at most `most` bytes, as this model.

    Raises RequestError (400, 408, 413, 415) that says what is wrong.
    """
    return parsed(await read_body(request, most), model)


def parsed(body: bytes, model: type[Model]) -> Model:
    """These bytes as this model. Raises RequestError (400)."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestError(400, "invalid_body", problem(error, model)) from None


async def read_body(request: web.Request, most: int | None = None) -> bytes:
    """The bytes that were sent, at most `most` of them. Raises RequestError (408, 413, 415, 503)."""
    if request.content_type != "application/json":
        raise RequestError(
            415, "unsupported_media_type", "the body must be JSON (Content-Type: application/json)"
        )
    context, place = request.app[CONTEXT], place_of(request)
    limit, length, rank = context.max_body_bytes, request.content_length, request[ACTOR].rank
    if rank is Rank.UNAUTHENTICATED:
        limit = min(limit, MOST_UNSIGNED)
    if most is not None:
        limit = min(limit, most)
    too_large = RequestError(
        413,
        "request_entity_too_large",
        f"the body is larger than the {limit} bytes that are allowed",
    )
    if length is not None and length > limit:
        raise too_large
    if not context.bodies.take(place, rank, limit if length is None else length):
        raise RequestError(
            503, "busy", "too many request bodies are being read; try again", {"Retry-After": "1"}
        )
    if request.content.is_eof():  # it came with the headers: there is nothing to wait for
        body = await request.read()
        if len(body) > limit:
            raise too_large
        return body
    place.rest()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await request.read()
    except TimeoutError:
        raise RequestError(
            408,
            "request_timeout",
            f"the body was not complete after {BODY_TIMEOUT_S:g} s",
            {"Connection": "close"},
        ) from None
    except web.RequestPayloadError:  # it quotes the body
        request.app[CONTEXT].malformed.add(request.remote or "unknown")
        raise RequestError(400, "malformed", "the body is not valid HTTP/1.1") from None
    finally:
        place.work()
    if len(body) > limit:
        raise too_large
    return body
