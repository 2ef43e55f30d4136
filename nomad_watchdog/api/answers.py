"""The one form of all JSON answers."""

from __future__ import annotations

from functools import partial
from typing import Final

from aiohttp import web

from nomad_watchdog.compact import as_json

json_response: Final = partial(web.json_bytes_response, dumps=as_json)
