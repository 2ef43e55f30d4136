"""Escalation sinks: webhook, Alertmanager, Consul event. Each has its own bounded queue, so that one that is down
does not delay the others.

An alert: ``{"key", "kind", "status": "firing"|"update"|"resolved", "episode", "rev", "at", "group":
[kind, value] of a group alert or None, "scope": [kind, value] of the election or None, "count", "devices": [[device id, reason], …], "summary", "evidence",
"uncoordinated"}``. `key` identifies the alert to the receiver: a repeated key is the same alert.
"""

from __future__ import annotations

import time

from watchdog_agent.runtime import http, secrets, transport
from watchdog_agent.runtime.loop import between
from watchdog_agent.runtime.stdlib_light import deque, json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Alert, Config, Document, SinkSpec, Timer

EXPIRES_S = 86400.0
"""Time after which an unresolved alert ends in Alertmanager, in seconds."""
RETRIED = (408, 425, 429)
"""4xx statuses that are retried; all others are final refusals."""


class Sink:
    """One receiver. Delivers one alert at a time, in order."""

    TIMEOUT_S = 5.0
    MAX_WAIT_S = 60.0
    MAX_QUEUED = 64

    def __init__(
        self,
        loop: Loop,
        spec: SinkSpec,
        config: Config,
        instance: str,
        log: Callable[..., None],
    ) -> None:
        """`spec`: one checked entry of ``escalate.sinks``."""
        self.loop, self.spec, self.config = loop, spec, config
        self.instance = instance
        self.log = log
        if spec.get("url"):
            port = 8500 if spec["kind"] == "consul_event" else 80
            self.url = http.Url(spec["url"], port, tls=True)
            trust = transport.trust(self.url, config.get("ca_cert", ""))
            self.trusted: Callable[[], ssl.SSLContext | None] = lambda: trust
        else:
            from watchdog_agent.consul import registration

            self.url = registration.place(config)
            self.trusted = lambda: registration.trusted_by(config)
        rules = config["escalate"]
        self.retry_s: float = rules["retry_s"]
        self.give_up_s: float = rules["give_up_s"]
        self.waiting: deque[tuple[Alert, float, Callable[[bool], None]]] = deque()
        self.sent = self.failed = self.dropped = self.tries = 0
        self.last_error = ""
        self.fetch: http.HttpRequest | None = None
        self.timer: Timer | None = None

    def put(self, alert: Alert, done: Callable[[bool], None]) -> None:
        """Queue an alert for delivery; call `done(taken)` once. A full queue drops the oldest one, and counts it."""
        if len(self.waiting) >= self.MAX_QUEUED:
            # The first one may be in progress: it stays until its response arrives.
            place = 1 if self.fetch is not None else 0
            lost = self.waiting[place]
            del self.waiting[place]
            self.dropped += 1
            lost[2](False)
        self.waiting.append((alert, time.monotonic() + self.give_up_s, done))
        if self.fetch is None and self.timer is None:
            self._send()

    def _send(self) -> None:
        self.timer = None
        if not self.waiting or self.fetch is not None:
            return
        method, path, body, headers = request_of(
            self.spec, self.waiting[0][0], self.config, self.instance
        )
        token = secrets.token(self.spec.get("token_file", ""))
        if self.spec["kind"] == "consul_event":
            from watchdog_agent.consul import registration

            if token := token or registration.read_token():
                headers.append(("X-Consul-Token", token))
        elif token:
            headers.append(("Authorization", f"Bearer {token}"))
        data = http.request(
            method, self.url.base + path or "/", self.url.host_header, body, headers
        )
        self.fetch = transport.send(
            self.loop, self.url, data, self.TIMEOUT_S, self._answered, self.trusted()
        )

    def _answered(
        self, status: int | None, headers: dict[str, str], _body: bytes, reason: str
    ) -> None:
        self.fetch = None
        if status is not None and 200 <= status < 300:
            self.sent += 1
            self._ended(True)
            return
        error = reason if status is None else f"status {status}"
        if error != self.last_error:
            self.last_error = error
            self.log("escalation is not taken", sink=self.spec["kind"], reason=error)
        refused = status is not None and 400 <= status < 500 and status not in RETRIED
        if refused or time.monotonic() > self.waiting[0][1]:
            self.failed += 1
            self._ended(False)
            return
        self.tries += 1
        wait = between(0.5, 1.0) * min(self.MAX_WAIT_S, self.retry_s * 2 ** min(self.tries - 1, 8))
        wait = max(wait, http.retry_after(headers, self.MAX_WAIT_S))
        self.timer = self.loop.later(wait, self._send)

    def _ended(self, taken: bool) -> None:
        self.tries = 0
        if taken:
            self.last_error = ""
        done = self.waiting.popleft()[2]
        done(taken)
        if self.fetch is None and self.timer is None:
            self._send()


def request_of(
    spec: SinkSpec, alert: Alert, config: Config, instance: str
) -> tuple[str, str, bytes, list[tuple[str, str]]]:
    """(method, path below the sink's URL, body, headers)."""
    if spec["kind"] == "alertmanager":
        body = json.dumps([alertmanager(alert)])
        return "POST", "/api/v2/alerts", body.encode(), []
    if spec["kind"] == "consul_event":
        # Gossiped to all servers and agents, at most 512 bytes: only the key, the status and the count.
        payload = {name: alert[name] for name in ("key", "status", "count")}
        return "PUT", f"/v1/event/fire/{spec['name']}", json.dumps(payload).encode(), []
    whole = {**alert, "v": 1, "by": {"device_id": config["device_id"], "instance": instance}}
    return "POST", "", json.dumps(whole).encode(), [("Idempotency-Key", alert["key"])]


def alertmanager(alert: Alert) -> Document:
    """The alert as Alertmanager's API v2 expects it (its openapi.yaml, postableAlert). The labels identify the alert
    there: they are the same for its updates and its end."""
    ends = alert["now"] if alert["status"] == "resolved" else alert["now"] + EXPIRES_S
    name = alert["kind"].title().replace("_", "").replace("-", "")
    labels = {"alertname": f"Watchdog{name}", "episode": alert["episode"]}
    if alert["scope"]:
        labels |= {"group_by": alert["scope"][0], "group": alert["scope"][1]}
    else:
        labels["device_id"] = alert["devices"][0][0]
    names = ", ".join(one[0] for one in alert["devices"][:50])
    return {
        "labels": labels,
        "annotations": {
            "summary": alert["summary"],
            "devices": names,
            "count": str(alert["count"]),
        },
        "startsAt": stamp(alert["at"]),
        "endsAt": stamp(ends),
    }


def stamp(seconds: float) -> str:
    """Format seconds since 1970 as RFC 3339, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
