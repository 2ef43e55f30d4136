"""From errors to answers, around each handler."""

from __future__ import annotations

import asyncio
import logging
import math
from http import HTTPStatus
from typing import Final

from aiohttp import web
from watchdog_agent import wire

from nomad_watchdog import failpoints
from nomad_watchdog.api.acceptor import Connection, place_of
from nomad_watchdog.api.connection_limits import Place, Rank
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.errors import LAST, SAFE, RequestError
from nomad_watchdog.api.responses import error_response
from nomad_watchdog.api.routing import Handler
from nomad_watchdog.errors import ConflictError, TransientError, WatchdogError
from nomad_watchdog.metrics import OTHER

log = logging.getLogger(__name__)

REFUSALS: Final = {
    401: "unauthorized",
    403: "forbidden",
    415: "encoding",
    421: "misdirected",
    429: "limited",
    503: "busy",
}
"""Status → how the metric calls it."""
LINGER: Final = 16 * 1024
"""Bytes of a body that are read to their end after its request was refused, so that the connection can be used again."""
HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def answer_to(error: WatchdogError) -> web.Response:
    """The status, code and message of an error that this project raised."""
    headers: dict[str, str] = {}
    if isinstance(error, TransientError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    elif isinstance(error, ConflictError):
        headers["Retry-After"] = "1"
    code = type(error).__name__.removesuffix("Error").lower()
    return error_response(error.http_status, code, str(error), headers)


def _from_http(error: web.HTTPException, request: web.Request) -> web.Response:
    headers: dict[str, str] = {}
    message = HTTPStatus(error.status).phrase.lower()
    code = message.replace(" ", "_").replace("-", "_")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        headers["Allow"] = allowed
        message = f"{error.method[:20]} is not allowed here; allowed are: {allowed}"
    elif isinstance(error, web.HTTPNotFound):
        message = "there is nothing at this path; GET /v1/openapi.json lists what there is"
    elif isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request.app[CONTEXT].max_body_bytes
        message = f"the body is larger than the {limit} bytes that are allowed"
    return error_response(error.status, code, message, headers)


@web.middleware
async def boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Translate every failure, count every answer."""
    response: web.StreamResponse
    place = place_of(request)
    place.work()
    try:
        _check(request)
        response = await request.app[CONTEXT].authenticator.answer(request, handler)
    except RequestError as error:
        response = error_response(error.status, error.code, error.message, error.headers)
        if error.status in REFUSALS:
            request.app[CONTEXT].metrics.refused(REFUSALS[error.status])
            request.app[CONTEXT].authenticator.refused(
                request, error.status, error.code, _route(request)
            )
            _remember(request, error)
    except WatchdogError as error:
        response = answer_to(error)
    except web.HTTPException as error:
        response = _from_http(error, request)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:  # the request's boundary: logged once, counted, told without details
        log.exception("request failed", extra={"route": _route(request)})
        response = error_response(500, "internal", "this is our fault; the log says more")
    finally:
        request.app[CONTEXT].bodies.give(place)
        place.rest()
    if not response.prepared:
        _end(request, response, place)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
    request.app[CONTEXT].metrics.request(_route(request), response.status)
    if failpoints.armed() == "K3" and request.method not in SAFE and response.status < 300:
        await _acknowledge(request, response)
    return response


def _end(request: web.Request, response: web.StreamResponse, place: Place) -> None:
    """Let go of a connection that has no place, or that was refused and goes on sending."""
    if place.rank is not Rank.UNAUTHENTICATED:
        if request.get(LAST):
            response.force_close()
        return
    if not place.spend():
        response.force_close()
    length = request.content_length
    if not request.content.is_eof() and (length is None or length > LINGER):
        response.force_close()
        if isinstance(request.protocol, Connection):
            request.protocol.hush()


def _remember(request: web.Request, error: RequestError) -> None:
    """A report that was refused explains why nothing is heard of its agent. Its body is not read for that."""
    if error.status not in (401, 403) or _route(request) != wire.REPORT_PATH:
        return
    context = request.app[CONTEXT]
    claim, peer = context.authenticator.claimed(request)
    claim = error.claim or claim
    slug, epoch = (claim.slug, claim.epoch) if claim is not None else (None, None)
    why = error.message if error.status == 403 else ""
    context.fleet.reports.refused(error.status, slug, epoch, peer=peer, why=why)


async def _acknowledge(request: web.Request, response: web.StreamResponse) -> None:
    """Send the answer to a wish to its last byte, and then say so to the fail point."""
    if _route(request).startswith(("/v1/devices", "/v1/webhook")):
        await response.prepare(request)
        await response.write_eof()
        failpoints.reached("K3")


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return OTHER if resource is None else resource.canonical


def _check(request: web.Request) -> None:
    context = request.app[CONTEXT]
    context.authenticator.let_in(request, context.routed.get(request.match_info.route))
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        raise RequestError(
            415, "unsupported_encoding", "the body must not be compressed (no Content-Encoding)"
        )
