"""The fields of a device in requests and files, with the same checks at every entry point."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from nomad_watchdog.config.problems import in_body
from nomad_watchdog.device_address import device_address
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import MAX_ID_BYTES, DeviceId, parse_device_id
from nomad_watchdog.model import Device
from nomad_watchdog.units import parse_duration

MAX_LABELS: Final = 32
LABEL_BYTES: Final = 128
ADDRESS_CHARS: Final = 255
"""Maximum characters of a host name (RFC 1035), with a trailing dot, or in brackets."""


def _id(text: str) -> str:
    try:
        return parse_device_id(text)
    except UserError as error:
        raise ValueError(str(error)) from error


def printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{ascii(text)[:80]} contains an unprintable character")
    return text


def _address(text: str) -> str:
    try:
        return device_address(text)
    except UserError as error:
        raise ValueError(str(error)) from error


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        for text in (key, value):
            printable(text)
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
        raise ValueError("must be a duration of more than 0")
    return text


def _ttl(text: str) -> str:
    if 0 < parse_duration(text) < 1:
        raise ValueError("must be 0s (never expires) or at least 1s")
    return text


Id = Annotated[str, Field(description=f"1 to {MAX_ID_BYTES} bytes"), AfterValidator(_id)]
Name = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(printable)]
Address = Annotated[
    str,
    Field(
        min_length=1,
        max_length=ADDRESS_CHARS,
        description="host name, IPv4 or IPv6 address, without scheme, port or path",
    ),
    AfterValidator(_address),
]
Labels = Annotated[dict[str, str], Field(max_length=MAX_LABELS), AfterValidator(_labels)]
Ttl = Annotated[str, Field(max_length=32), AfterValidator(_ttl)]
Duration = Annotated[str, Field(max_length=32), AfterValidator(_duration)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)


def examples(*bodies: dict[str, JsonValue]) -> ConfigDict:
    """The configuration of a model with examples of its JSON, for the description of the API."""
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


class DeviceIn(Strict):
    """The desired state of a device, without its id."""

    model_config = examples({"address": "10.0.0.7", "class": "camera", "labels": {"site": "north"}})

    agent_class: Name = Field("default", alias="class")
    address: Address
    labels: Labels = Field(default_factory=dict)
    ttl: Ttl | None = Field(
        None, description="a duration; 0s = never expires, null = as configured"
    )

    @property
    def names_class(self) -> bool:
        """Whether the class was given."""
        return "agent_class" in self.model_fields_set

    def device(self, device_id: DeviceId) -> Device:
        """As `model.Device`."""
        ttl_s = None if self.ttl is None else parse_duration(self.ttl)
        return Device(device_id, self.agent_class, self.address, dict(self.labels), ttl_s)


class DeviceItem(DeviceIn):
    """The desired state of a device."""

    model_config = examples({"id": "cam-1", "address": "10.0.0.7"})

    id: Id


_AS_JSON: Final = {
    "a block { ... }": "an object { ... }",
    'a map such as { name = "value" }': 'an object such as {"name": "value"}',
}
"""Words of the configuration file → words for JSON."""


def problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The errors in a body for this model, as text. Quotes at most a short part of the body."""
    found = error.errors(include_url=False)
    parts: list[str] = []
    for item in found[:5]:
        path, message = in_body(item, model)
        for words, instead in _AS_JSON.items():
            message = message.replace(words, instead)
        where = ".".join(_printed(part) for part in path)
        parts.append(f"{where}: {message}" if where else message)
    more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
    return "; ".join(parts) + more


def _printed(part: object) -> str:
    text = str(part)[:64]
    return text if text.isprintable() else ascii(text)
