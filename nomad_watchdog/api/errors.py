"""Every failure becomes {"error": {"code", "message"}}; nothing of our insides is told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from aiohttp import web

from nomad_watchdog.core.agent_token import TokenClaim

log = logging.getLogger(__name__)

SAFE: Final = frozenset({"GET", "HEAD"})
LAST: Final = web.RequestKey("last", bool)
"""The connection has no place beyond this request."""


class RequestError(Exception):
    """The request is wrong; `message` says what was found and what is allowed."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = dict(headers or {})
        self.claim: TokenClaim | None = None
        """Of a report that was refused: what it is of, where its body says so."""
