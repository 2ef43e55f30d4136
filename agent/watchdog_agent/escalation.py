"""Tells a webhook, once an episode, about a device that no repair has brought back; and of its return."""

from __future__ import annotations

import json
import os

from . import http

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop
    from .shapes import Config, Document


class Escalations:
    """What is open, and what the sink has not taken yet; sent again until it does."""

    TIMEOUT_S = 3.0

    def __init__(self, loop: Loop, config: Config, instance: str, log: Callable[..., None]) -> None:
        self.loop, self.config, self.instance, self.log = loop, config, instance, log
        self.sinks = [http.Url(sink["url"]) for sink in config["escalate"]["sinks"]]
        self.open: dict[str, Document] = {}
        self.waiting: list[Document] = []
        self.fetch: http.Fetch | None = None

    def raise_(self, key: str, summary: str, evidence: dict[str, Any]) -> None:
        """Tell it, unless it is open already. `key`: its kind, as ``offline``."""
        if key not in self.open:
            told = {"key": f"{os.urandom(8).hex()}.1", "kind": key, "status": "firing"}
            devices = [[self.config["device_id"], summary[:120]]]
            self.open[key] = told | {"devices": devices, "summary": summary, "evidence": evidence}
            self._send()

    def clear(self, key: str) -> None:
        """What was raised is over."""
        told = self.open.pop(key, None)
        if told is not None:
            end = told["key"].replace(".1", ".resolved")
            self.waiting = [{"key": end, "kind": key, "status": "resolved"}]
            self._send()

    def _send(self) -> None:
        untold = [one for one in self.open.values() if not one.get("told")] + self.waiting
        if self.fetch is not None or not untold or not self.sinks:
            return
        url, told = self.sinks[0], untold[0]

        def answered(status: int | None, _headers: dict[str, str], _body: Any) -> None:
            self.fetch = None
            if status is not None and 200 <= status < 300:
                told["told"] = True
                self.waiting = [one for one in self.waiting if one is not told]
                self._send()
            else:
                self.loop.later(1.0, self._send)

        data = http.request("POST", url.base, url.host_header, json.dumps(told).encode())
        where = (url.host, url.port)
        self.fetch = http.Fetch(self.loop, where, data, self.TIMEOUT_S, answered)

    def close(self, done: Callable[[], None]) -> None:
        """Nothing is to be left behind; what waits is kept."""
        done()

    def kept(self) -> list[Document]:
        """What is open, to be stored."""
        return list(self.open.values())

    def restore(self, kept: object) -> None:
        """Go on with what an earlier run had open."""
        for one in kept if isinstance(kept, list) else []:
            if isinstance(one, dict) and isinstance(one.get("kind"), str):
                self.open[one["kind"]] = one
        self._send()
