"""The type of a route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from pydantic import BaseModel

from nomad_watchdog.core.roles import Right

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One operation of the API. `answers`: status → its meaning, or the model of the response's body."""

    method: str
    path: str
    handler: Handler
    summary: str
    answers: Mapping[int, str | type[BaseModel]]
    body: type[BaseModel] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    """Query parameter → its description."""
    public: bool = False
    """Needs no token and no client certificate, and has no rate limit."""
    needs: Right | None = None
    """The right that a caller needs, if it is not that of the method."""
    signed: bool = False
    """A signature may replace the token; the handler verifies it."""
    media: str = "application/json"

    @property
    def right(self) -> Right:
        """The right that a caller needs. By default, reading for GET and operating for all other methods."""
        return self.needs or (Right.READ if self.method == "GET" else Right.OPERATE)

    @property
    def resource(self) -> str:
        """The path for the router. An id is one segment, whatever characters it has."""
        return self.path.replace("{id}", "{id:[^/]+}")
