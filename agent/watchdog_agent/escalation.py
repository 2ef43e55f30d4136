"""Tells a webhook, once, about a device that no repair has brought back."""

from __future__ import annotations

import json

from . import http

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop
    from .shapes import Config, Document


class Escalations:
    """Sends what is raised to each sink, again until it is taken."""

    TIMEOUT_S = 3.0
    MOST = 16

    def __init__(self, loop: Loop, config: Config, instance: str, log: Callable[..., None]) -> None:
        self.loop, self.instance, self.log = loop, instance, log
        self.device_id = config["device_id"]
        self.sinks = [http.Url(sink["url"]) for sink in config["escalate"]["sinks"]]
        self.waiting: list[Document] = []
        self.fetch: http.Fetch | None = None

    def raise_(self, key: str, summary: str, evidence: Document) -> None:
        """Tell it. `key` names the episode's device."""
        self._add({"key": key, "status": "raised", "summary": summary, "evidence": evidence})

    def clear(self, key: str) -> None:
        """What was raised is over."""
        self._add({"key": key, "status": "cleared"})

    def _add(self, told: Document) -> None:
        self.waiting.append({"device_id": self.device_id, "instance": self.instance, **told})
        del self.waiting[: -self.MOST]
        self._send()

    def _send(self) -> None:
        if self.fetch is not None or not self.waiting or not self.sinks:
            return
        url, told = self.sinks[0], self.waiting[0]

        def answered(status: int | None, _headers: dict[str, str], _body: Any) -> None:
            self.fetch = None
            if status is not None and 200 <= status < 300:
                self.waiting.remove(told)
                self._send()
            else:
                self.loop.later(1.0, self._send)

        data = http.request("POST", url.base, url.host_header, json.dumps(told).encode())
        where = (url.host, url.port)
        self.fetch = http.Fetch(self.loop, where, data, self.TIMEOUT_S, answered)

    def close(self, done: Callable[[], None]) -> None:
        """Stop; what waits is kept."""
        done()

    def kept(self) -> list[Document]:
        """What waits still."""
        return self.waiting

    def restore(self, kept: list[Document]) -> None:
        """Go on with what an earlier run could not tell."""
        self.waiting = kept[-self.MOST :]
        self._send()
