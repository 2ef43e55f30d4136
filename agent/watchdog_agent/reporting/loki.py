"""Ships log lines to Loki's push API, for schedulers that do not collect logs. Imported only if configured.

https://grafana.com/docs/loki/latest/reference/loki-http-api/#ingest-logs: labels create streams, and many
streams make Loki slow, so there are few labels (job, class, version); the device is in the structured metadata.
"""

from __future__ import annotations

import time

from watchdog_agent.runtime import http, secrets, transport
from watchdog_agent.runtime.loop import between
from watchdog_agent.runtime.stdlib_light import deque, json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.status_types import LogCounts
    from watchdog_agent.runtime.types import Config, Document, Timer


class LokiShipper:
    """Queues lines and sends them in batches. While Loki does not accept them, at most MAX_LINES are kept; beyond
    that the oldest are dropped and counted."""

    MAX_LINES = 1000
    BATCH = 200
    EVERY_S = 2.0
    TIMEOUT_S = 5.0
    MAX_WAIT_S = 60.0
    CLOSE_S = 0.5

    def __init__(self, loop: Loop, config: Config) -> None:
        """`config` has a checked ``loki``."""
        self.loop = loop
        spec = config["loki"]
        self.url = http.Url(spec["url"], 3100, tls=True)
        self.trusted = transport.trust(self.url, config.get("ca_cert", ""))
        self.token_file = spec.get("token_file", "")
        self.tenant = spec.get("tenant", "")
        self.labels = {
            "job": "watchdog-agent",
            "agent_class": config.get("agent_class", ""),
            "version": config.get("version", ""),
        }
        self.about = {"device_id": config["device_id"], "epoch": str(config["epoch"])}
        self.lines: deque[tuple[str, str]] = deque()
        self.on_the_way = 0
        self.shipped = self.dropped = self.refused = self.failures = 0
        self.last_ns = 0
        self.fetch: http.HttpRequest | None = None
        self.timer: Timer | None = None
        self.closing: Callable[[], None] | None = None

    def put(self, line: str) -> None:
        """Ship this line, with the current time."""
        # Loki orders a stream by these timestamps: they are unique, and never go back with the clock.
        self.last_ns = max(time.time_ns(), self.last_ns + 1)
        if len(self.lines) >= self.MAX_LINES:
            # Lines being sent stay until the response arrives.
            del self.lines[self.on_the_way]
            self.dropped += 1
        self.lines.append((str(self.last_ns), line))
        if self.fetch is None and self.timer is None:
            self.timer = self.loop.later(self.EVERY_S * between(0.5, 1.0), self._send)

    def _send(self) -> None:
        self.timer = None
        if not self.lines or self.fetch is not None:
            return
        batch = [[at, line, self.about] for at, line in list(self.lines)[: self.BATCH]]
        self.on_the_way = len(batch)
        body: Document = {"streams": [{"stream": self.labels, "values": batch}]}
        headers = [("X-Scope-OrgID", self.tenant)] if self.tenant else []
        if token := secrets.token(self.token_file):
            headers.append(("Authorization", f"Bearer {token}"))
        path = f"{self.url.base}/loki/api/v1/push"
        raw = json.dumps(body).encode()
        data = http.request("POST", path, self.url.host_header, raw, headers)
        self.fetch = transport.send(
            self.loop, self.url, data, self.TIMEOUT_S, self._answered, self.trusted
        )

    def _answered(
        self, status: int | None, headers: dict[str, str], _body: bytes, _reason: str
    ) -> None:
        self.fetch = None
        later = status is None or status == 429 or status >= 500
        sent, self.on_the_way = self.on_the_way, 0
        if not later:
            for _ in range(sent):
                self.lines.popleft()
            self.failures = 0
            if status in (200, 204):
                self.shipped += sent
            else:
                # Permanently refused (too old, too long, no permission): a retry would be refused again.
                self.refused += sent
        if self.closing is not None and (later or not self.lines):
            self._closed()
            return
        wait = 0.0 if self.closing is not None else self.EVERY_S * between(0.5, 1.0)
        if later:
            self.failures += 1
            wait = between(0.5, 1.0) * min(self.MAX_WAIT_S, 2.0 ** min(self.failures, 8))
            wait = max(wait, http.retry_after(headers, self.MAX_WAIT_S))
        if self.lines:
            self.timer = self.loop.later(wait, self._send)

    def status(self) -> LogCounts:
        """The log shipper's part of /status."""
        return {"shipped": self.shipped, "dropped": self.dropped, "refused": self.refused}

    def close(self, then: Callable[[], None]) -> None:
        """Ship the remaining lines, and call back after at most CLOSE_S."""
        self.closing = then
        self.loop.later(self.CLOSE_S, self._closed)
        if self.timer is not None:
            self.timer[2] = None
            self.timer = None
        if self.fetch is None and not self.lines:
            self._closed()
        elif self.fetch is None:
            self._send()

    def _closed(self) -> None:
        then, self.closing = self.closing, None
        if then is not None:
            then()
