"""The error of a request: {"error": {"code", "message"}}, without internal details."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from aiohttp import web

from nomad_watchdog.core.agent_token import TokenClaim

log = logging.getLogger(__name__)

SAFE: Final = frozenset({"GET", "HEAD"})
LAST: Final = web.RequestKey("last", bool)
"""The connection must be closed after this request, for want of a place."""


class RequestError(Exception):
    """The request is invalid; `message` states what was found and what is allowed."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = dict(headers or {})
        self.claim: TokenClaim | None = None
        """Of a refused report: the device and epoch in its body."""
