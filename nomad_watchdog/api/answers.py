"""Bodies of the API's responses."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
    """A page of devices; `next` is the cursor of the next page, null at the end."""

    items: list[DeviceOut]
    next: str | None
    index: int


class DeviceChange(BaseModel):
    """The result of a write, which was stored before the response."""

    id: str
    slug: str
    changed: bool
    generation: int
    epoch: int
    presence: str
    duplicate: bool = False
    """The event was applied before; this call had no effect."""


class BulkResult(BaseModel):
    """The result of one item of a bulk request."""

    id: str | None
    action: Literal["put", "delete"]
    index: int = Field(
        description="position in the list `devices` or `delete` of the request, from 0"
    )
    status: int
    changed: bool = False
    error: str | None = None


class BulkOut(BaseModel):
    """Results in the order of the request: devices, then delete."""

    results: list[BulkResult]


class ErrorBody(BaseModel):
    """The error."""

    code: str
    message: str


class ErrorOut(BaseModel):
    """Every response with a status of 400 and above."""

    error: ErrorBody


class AnyOut(BaseModel):
    """An object; later versions may add fields."""

    model_config = ConfigDict(extra="allow")
