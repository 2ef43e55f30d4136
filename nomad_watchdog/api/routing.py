"""What an operation of the API is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from pydantic import BaseModel

from nomad_watchdog.core.roles import Right

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation. `answers`: status → what it means, or the model of its body."""

    method: str
    path: str
    handler: Handler
    summary: str
    answers: Mapping[int, str | type[BaseModel]]
    body: type[BaseModel] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    """Query parameter → what it is."""
    public: bool = False
    """Answered to everybody: without a token, without a client certificate, at any rate."""
    asks: Right | None = None
    """The right that is asked for, where it is not the one of the method."""
    signed: bool = False
    """A signature may stand for the token; the handler checks it."""
    media: str = "application/json"

    @property
    def right(self) -> Right:
        """What a caller must be allowed. A route that says nothing changes something: operators only."""
        return self.asks or (Right.READ if self.method == "GET" else Right.OPERATE)

    @property
    def resource(self) -> str:
        """The path as the router takes it: an id is one segment, whatever it holds."""
        return self.path.replace("{id}", "{id:[^/]+}")
