"""Reads the body of a request, bounded in bytes and time, as a model."""

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
"""A body must be complete in so long: a slow sender holds no handler."""
Model = TypeVar("Model", bound=BaseModel)


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
        limit = min(limit, MAX_UNSIGNED)
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
        request.app[MALFORMED].add(request.remote or "unknown")
        raise RequestError(400, "malformed", "the body is not valid HTTP/1.1") from None
    finally:
        place.work()
    if len(body) > limit:
        raise too_large
    return body
