"""The form of all JSON responses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from aiohttp import web

from nomad_watchdog.fast_json import as_json
from nomad_watchdog.secret_values import hide

json_response: Final = partial(web.json_bytes_response, dumps=as_json)


def error_response(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> web.Response:
    """The form of all error responses."""
    body = {"error": {"code": code, "message": hide(message)}}
    return json_response(body, status=status, headers=headers)
