"""The middleware around each handler: errors become responses, and responses are counted."""

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
from nomad_watchdog.metrics.labels import OTHER

log = logging.getLogger(__name__)

REFUSALS: Final = {
    401: "unauthorized",
    403: "forbidden",
    415: "encoding",
    421: "misdirected",
    429: "limited",
    503: "busy",
}
"""Status → its label value in the metric."""
LINGER: Final = 16 * 1024
"""A body of at most this many bytes is read to its end after its request was refused, so that the connection can be
used again."""
HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def answer_to(error: WatchdogError) -> web.Response:
    """The response for an error of this project."""
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
        message = "there is nothing at this path; GET /v1/openapi.json lists all paths"
    elif isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request.app[CONTEXT].max_body_bytes
        message = f"the body is larger than the {limit} bytes that are allowed"
    return error_response(error.status, code, message, headers)


@web.middleware
async def boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into a response, and count every response."""
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
            _record_refused_report(request, error)
    except WatchdogError as error:
        response = answer_to(error)
    except web.HTTPException as error:
        response = _from_http(error, request)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:  # the request's boundary: logged once, counted, answered without details
        log.exception("request failed", extra={"route": _route(request)})
        response = error_response(500, "internal", "internal error of the server; see its log")
    finally:
        request.app[CONTEXT].bodies.release(place)
        place.rest()
    if not response.prepared:
        _close_if_needed(request, response, place)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
    request.app[CONTEXT].metrics.request(_route(request), response.status)
    if failpoints.armed() == "K3" and request.method not in SAFE and response.status < 300:
        await _acknowledge(request, response)
    return response


def _close_if_needed(request: web.Request, response: web.StreamResponse, place: Place) -> None:
    """Close a connection that has no place, or whose request was refused and is not read to its end."""
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


def _record_refused_report(request: web.Request, error: RequestError) -> None:
    """Record a refused report: it explains why no report of its agent arrives. Its body is not read for that."""
    if error.status not in (401, 403) or _route(request) != wire.REPORT_PATH:
        return
    context = request.app[CONTEXT]
    claim, peer = context.authenticator.claimed(request)
    claim = error.claim or claim
    slug, epoch = (claim.slug, claim.epoch) if claim is not None else (None, None)
    why = error.message if error.status == 403 else ""
    context.fleet.reports.refused(error.status, slug, epoch, peer=peer, why=why)


async def _acknowledge(request: web.Request, response: web.StreamResponse) -> None:
    """Send the whole response to a change, then reach the failpoint K3 (after the acknowledgement)."""
    if _route(request).startswith(("/v1/devices", "/v1/webhook")):
        await response.prepare(request)
        await response.write_eof()
        failpoints.reached("K3")


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return OTHER if resource is None else resource.canonical


def _check(request: web.Request) -> None:
    context = request.app[CONTEXT]
    context.authenticator.authenticate(request, context.routed.get(request.match_info.route))
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        raise RequestError(
            415, "unsupported_encoding", "the body must not be compressed (no Content-Encoding)"
        )
