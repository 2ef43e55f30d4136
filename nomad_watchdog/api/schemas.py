"""What may come in and what goes out. Pydantic ends here: behind the door are the values of `model`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final, Literal, TypeVar

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.errors import UserError
from nomad_watchdog.fleet import AgentReport
from nomad_watchdog.ids import MAX_ID_BYTES, DeviceId, parse_device_id, slug_of
from nomad_watchdog.model import AgentState, Device, Epoch

MOST_LABELS: Final = 32
LABEL_BYTES: Final = 128
ADDRESS_CHARS: Final = 253
"""Longest host name (RFC 1035)."""
MOST_HEARD: Final = 500
"""Reports that one replica tells another at once."""
MOST_BULK: Final = 5_000
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
    if not text.isprintable() or any(c.isspace() for c in text):
        raise ValueError(
            f"address {ascii(text)[:80]} holds a blank or control character; "
            "a host name or IP address is allowed"
        )
    return text


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


def _tame(text: str) -> str:
    # What an agent says of its device is shown, so it is made harmless rather than lost.
    cut = text[:REASON_CHARS]
    return cut if cut.isprintable() else "".join(c if c.isprintable() else "�" for c in cut)


Id = Annotated[str, Field(description=f"1 to {MAX_ID_BYTES} bytes"), AfterValidator(_id)]
Name = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Address = Annotated[str, Field(min_length=1, max_length=ADDRESS_CHARS), AfterValidator(_address)]
Labels = Annotated[dict[str, str], Field(max_length=MOST_LABELS), AfterValidator(_labels)]
Count = Annotated[int, Field(ge=0, le=_BIG)]


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


class DeviceIn(_In):
    """The wish for one device, without its id."""

    agent_class: Name = Field("default", alias="class")
    address: Address
    labels: Labels = Field(default_factory=dict)

    def device(self, device_id: DeviceId) -> Device:
        """As the value that goes inside."""
        return Device(device_id, self.agent_class, self.address, dict(self.labels))


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
    address: Address | None = None
    labels: Labels = Field(default_factory=dict)


class WebhookIn(_In):
    """What a gateway sends when a device comes or goes."""

    event: Literal["connected", "disconnected"]
    device: WebhookDevice


class ConfirmIn(_In):
    """Which held stops are meant: `held.id` of the plan that was looked at."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]


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
    state: AgentState
    was_ready: bool
    misses: Count
    confirmed: bool
    reason: Annotated[str, AfterValidator(_tame)] = ""
    listen: Annotated[str, Field(max_length=300), AfterValidator(_printable)] = ""
    dropped: Count = 0
    stopping: bool = False

    def report(self) -> AgentReport:
        """As the value that goes inside."""
        device_id = DeviceId(self.device_id)
        return AgentReport(
            slug=slug_of(device_id),
            device_id=device_id,
            epoch=Epoch(self.epoch),
            **self.model_dump(exclude={"v", "device_id", "epoch", "agent_class"}),
        )


class HearsayIn(BaseModel):
    """Reports that another replica has accepted."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    reports: Annotated[list[ReportIn], Field(max_length=MOST_HEARD)]


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


def problem(error: ValidationError) -> str:
    """What is wrong, in words, without repeating what was sent at length."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    parts: list[str] = []
    for item in found[:5]:
        where = ".".join(_printed(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown field"
        parts.append(f"{where}: {message}" if where else message)
    more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
    return "; ".join(parts) + more


def _printed(part: object) -> str:
    text = str(part)[:64]
    return text if text.isprintable() else ascii(text)


async def read(request: web.Request, model: type[Model]) -> Model:
    """The body as this model.

    Raises RequestError (400, 408, 413, 415) that says what is wrong.
    """
    return parsed(await read_body(request), model)


def parsed(body: bytes, model: type[Model]) -> Model:
    """These bytes as this model. Raises RequestError (400)."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestError(400, "invalid_body", problem(error)) from None


async def read_body(request: web.Request) -> bytes:
    """The bytes that were sent. Raises RequestError (408, 413, 415)."""
    if request.content_type != "application/json":
        raise RequestError(
            415, "unsupported_media_type", "the body must be JSON (Content-Type: application/json)"
        )
    limit = request.app[CONTEXT].max_body_bytes
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise RequestError(
            408,
            "request_timeout",
            f"the body was not complete after {BODY_TIMEOUT_S:g} s",
            {"Connection": "close"},
        ) from None
