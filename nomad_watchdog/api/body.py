"""Reads the body of a request as a model, with a limit of bytes and time."""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from nomad_watchdog.api.acceptor import place_of
from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.body_memory import MAX_UNSIGNED
from nomad_watchdog.api.connection_limits import Rank
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.api.malformed import MALFORMED
from nomad_watchdog.device_fields import problem

BODY_TIMEOUT_S: Final = 20.0
"""Maximum time until a body is complete, so that a slow sender does not occupy a handler."""
Model = TypeVar("Model", bound=BaseModel)


async def read(request: web.Request, model: type[Model], most: int | None = None) -> Model:
    """The body, of at most `most` bytes, as this model.

    Raises RequestError (400, 408, 413, 415, 503).
    """
    return parsed(await read_body(request, most), model)


def parsed(body: bytes, model: type[Model]) -> Model:
    """These bytes as this model. Raises RequestError (400)."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestError(400, "invalid_body", problem(error, model)) from None


async def read_body(request: web.Request, most: int | None = None) -> bytes:
    """The bytes of the body, at most `most`. Raises RequestError (400, 408, 413, 415, 503)."""
    if request.content_type != "application/json":
        raise RequestError(
            415, "unsupported_media_type", "the body must be JSON (Content-Type: application/json)"
        )
    context, place = request.app[CONTEXT], place_of(request)
    length, rank = request.content_length, request[ACTOR].rank
    limit = _limit(context.max_body_bytes, rank, most)
    if length is not None and length > limit:
        raise _too_large(limit)
    if not context.bodies.reserve(place, rank, limit if length is None else length):
        raise RequestError(
            503, "busy", "too many request bodies are being read; try again", {"Retry-After": "1"}
        )
    # A body that came with the headers needs no timeout.
    body = await (request.read() if request.content.is_eof() else _arriving(request))
    if len(body) > limit:
        raise _too_large(limit)
    return body


def _limit(max_bytes: int, rank: Rank, most: int | None) -> int:
    """The maximum size of a body from a caller of this rank."""
    limits = [max_bytes]
    limits += [MAX_UNSIGNED] if rank is Rank.UNAUTHENTICATED else []
    limits += [most] if most is not None else []
    return min(limits)


def _too_large(limit: int) -> RequestError:
    message = f"the body is larger than the {limit} bytes that are allowed"
    return RequestError(413, "request_entity_too_large", message)


async def _arriving(request: web.Request) -> bytes:
    """The body, when it is complete. Raises RequestError (400, 408)."""
    place = place_of(request)
    place.rest()
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
    except web.RequestPayloadError:  # its text quotes the body
        request.app[MALFORMED].add(request.remote or "unknown")
        raise RequestError(400, "malformed", "the body is not valid HTTP/1.1") from None
    finally:
        place.work()
