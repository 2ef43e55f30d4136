"""The one form of all JSON answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from nomad_watchdog.compact import as_json


def json_response(
    body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """As aiohttp's, encoded at once: its own goes by way of text."""
    return web.Response(
        body=as_json(body), status=status, headers=headers, content_type="application/json"
    )
