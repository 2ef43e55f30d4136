"""Types of settings: durations, sizes, addresses. Each value is checked and converted once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Final, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticKnownError
from watchdog_agent.config import optional_table, table
from watchdog_agent.runtime.parsing import whole

from nomad_watchdog import text_files
from nomad_watchdog.clients.hashicorp_environment import checked_address
from nomad_watchdog.device_address import device_address
from nomad_watchdog.errors import UserError
from nomad_watchdog.secret_values import know_url
from nomad_watchdog.units import parse_duration, parse_size, show

_NAMESPACE: Final = re.compile(r"[a-zA-Z0-9-]{1,128}")
MAX_CERTIFICATES: Final = 8192
"""Maximum length in characters: the certificates are part of each agent's document."""


def checked_url(value: str) -> str:
    """An address with its scheme and without a trailing slash. Raises ValueError."""
    know_url(value)
    return checked_address(value)


def checked_url_or_none(value: str) -> str:
    return checked_url(value) if value else ""


def checked_host(value: str) -> str:
    """A host name or IP address, checked as the address of a device. Raises ValueError."""
    try:
        return device_address(value)
    except UserError as error:
        raise ValueError(str(error)) from None


def checked_namespace(value: str) -> str:
    """One namespace of Nomad or Consul. Raises ValueError."""
    if value == "*":
        raise ValueError(
            '"*" means all namespaces, and agents run in one; name it, for example "default"'
        )
    if not _NAMESPACE.fullmatch(value):
        raise ValueError(
            f"{show(value)} is not a namespace; write letters, digits and -, at most 128"
        )
    return value


def checked_listen(value: str) -> str:
    host, separator, port = value.rpartition(":")
    try:
        whole(port if separator else "", 0, 65535)
    except ValueError:
        raise ValueError(f"{show(value)} is not HOST:PORT") from None
    return f"{host or '0.0.0.0'}:{port}"  # noqa: S104  # ":9670" means every address, as in Go


def certificates(setting: str, path: str) -> str:
    """The PEM certificates in a file, for the agent's document. Raises UserError if the file contains no certificate,
    contains a private key, or is too long."""
    text = text_files.read(setting, path)
    found = text_files.only_pem(text)
    if "BEGIN CERTIFICATE" not in found or "PRIVATE KEY" in text or len(found) > MAX_CERTIFICATES:
        raise UserError(
            f"{setting} {show(path)} must hold certificates in PEM form and no key, 8 KiB at most"
        )
    return found


def within(setting: table.Range) -> object:
    """The agent's bounds for a number."""
    return Field(ge=setting.low, le=setting.high)


def fitting(setting: table.TextRule | optional_table.Command) -> AfterValidator:
    """A validator that applies the agent's check of text or of a command."""

    def check(value: object) -> object:
        try:
            setting.check(value)
        except ValueError as error:
            raise ValueError(f"found {show(value)}; {error}") from None
        return value

    return AfterValidator(check)


Duration = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds; the bounds are those of the agent."""
Seconds = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Url = Annotated[str, AfterValidator(checked_url)]
Host = Annotated[str, Field(max_length=255), AfterValidator(checked_host)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Text = Annotated[str, Field(max_length=1024)]
Absolute = Annotated[str, fitting(table.PATH)]
Phrase = Annotated[str, fitting(table.PHRASE)]
Command = Annotated[tuple[str, ...], fitting(optional_table.COMMAND)]
Plugin = Annotated[str, fitting(optional_table.PLUGIN)]


def checked_inventories(value: object) -> object:
    """One path, or a list of distinct paths, that end in .hcl or .json. Raises ValueError."""
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list | tuple):
        return paths
    for path in paths:
        if not isinstance(path, str) or not path.endswith((".hcl", ".json")):
            raise ValueError(
                f"{show(path)} is no inventory; name a file that ends in .hcl or .json"
            )
    if len(set(paths)) != len(paths):
        raise ValueError("names a file twice")
    return tuple(paths)


Inventories = Annotated[
    tuple[Text, ...], BeforeValidator(checked_inventories), Field(max_length=64)
]


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_own_type(cls, value: object, info: ValidationInfo) -> object:
        """Reject what Pydantic would convert: true to 1, "5" to 5, and 1 or "yes" to true. Raises
        PydanticKnownError."""
        wanted = _types(cls, info.field_name or "")
        for one in _leaves(value):
            if wanted & {int, float} and not wanted & {str, bool} and isinstance(one, bool | str):
                raise PydanticKnownError("int_type")
            if (
                wanted == {bool}
                and isinstance(one, int | float | str)
                and not isinstance(one, bool)
            ):
                raise PydanticKnownError("bool_type")
        return value


@cache
def _types(block: type[BaseModel], name: str) -> frozenset[object]:
    """The scalar types of a setting and of its items; `str` if one of our validators reads the value first."""

    def parts(annotation: object) -> Iterator[object]:
        if isinstance(annotation, BeforeValidator):
            yield str
        elif annotation in {bool, int, float, str}:
            yield annotation
        for one in get_args(annotation):
            yield from parts(one)

    field = block.model_fields[name]
    return frozenset(found for one in (field.annotation, *field.metadata) for found in parts(one))


def from_text(block: type[BaseModel], name: str, text: str) -> object:
    """Convert an environment variable to the value of a setting. Numbers and booleans are converted and lists are
    split at commas. Other text is returned unchanged, and validation rejects it."""
    if get_origin(block.model_fields[name].annotation) is tuple:
        return [element.strip() for element in text.split(",")]
    wanted = _types(block, name)
    for kind in (bool, int, float):
        if kind in wanted and str not in wanted:
            try:
                return TypeAdapter(kind).validate_python(text)
            except ValidationError:
                return text
    return text


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value
