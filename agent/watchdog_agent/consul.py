"""Registration of this agent in the local Consul agent. Evidence for others; we live without it."""

from __future__ import annotations

import os

from . import http, wire
from .light import json
from .loop import between

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .loop import Loop
    from .shapes import Config, Document, Fetched, Said


class Registration:
    """Registers, repeats it (free when unchanged, and it cures a Consul agent that lost us), and
    deregisters. `said(text)` gets what is worth a log line, once a change."""

    TIMEOUT_S = 2.0
    CLOSE_S = 1.0
    MOST_WAIT_S = 30.0

    def __init__(  # called in one place
        self,
        loop: Loop,
        config: Config,
        instance: str,
        listen: str,
        said: Said,
        registered: Callable[[], None] = lambda: None,
    ) -> None:
        """`registered()` is called when Consul has taken us for the first time."""
        self.loop = loop
        self.said = said
        self.registered = registered
        self.config = config
        self.url = place(config)
        self.done = False
        self.last = ""
        self.every_s = config.get("register_every_s", 45.0)
        self.path = f"{self.url.base}/v1/agent/service"
        self.slug = config["slug"]
        self.body = json.dumps(registration(config, instance, listen)).encode()
        self.failures = 0
        self.closing: Callable[[], None] | None = None
        self.fetch: http.Fetch | None = None

    def start(self) -> None:
        """Register now, and again for ever."""
        self._call("PUT", "/register?replace-existing-checks=false", self.body, self._answered)

    def _call(
        self,
        method: str,
        path: str,
        body: bytes,
        answered: Fetched,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        headers = [("X-Consul-Token", token)] if (token := read_token()) else []
        data = http.request(method, self.path + path, self.url.host_header, body, headers)
        trusted = trusted_by(self.config)
        self.fetch = http.ask(self.loop, self.url, data, timeout_s, answered, trusted)

    def _answered(self, status: int | None, _headers: dict[str, str], body: Any) -> None:
        if self.closing is not None:
            return
        text = body if status is None else f"status {status}"
        if status == 200:
            first, self.done, self.failures, wait = not self.done, True, 0, self.every_s
            if first:
                self.registered()
            text = "registered"
        else:
            self.failures += 1
            wait = min(self.MOST_WAIT_S, 0.5 * 2 ** min(self.failures, 8))
        if text != self.last:
            self.last = text
            self.said(f"consul: {text}")
        self.loop.later(wait * between(0.8, 1.2), self._again)

    def _again(self) -> None:
        if self.closing is None:
            self.start()

    def close(self, then: Callable[[], None]) -> None:
        """Deregister, then call back, at the latest after CLOSE_S. Also when no registration was
        confirmed: one that was on its way may have been taken."""
        self.closing = then
        if self.fetch is not None:
            self.fetch.cancel()
        self._call("PUT", f"/deregister/{self.slug}", b"", lambda *_: then(), self.CLOSE_S)


def place(config: Config) -> http.Url:
    """Where Consul is; without a port on the one that our control plane takes."""
    return http.Url(config["consul"], 8500, tls=True, tls_port=8500)


def trusted_by(config: Config) -> Any:
    """What `http.ask` needs for the next call of Consul; None over http."""
    spec = config.get("consul_tls")
    return None if spec is None else spec["trust"].now()


def registration(config: Config, instance: str, listen: str) -> Document:
    """The service as Consul wants it (https://developer.hashicorp.com/consul/api-docs/agent/service).

    The slug is id and tag: a tag is what Consul's DNS and its cheap lookups can find."""
    host, _, port = listen.rpartition(":")
    return {
        "ID": config["slug"],
        "Name": config.get("service") or wire.SERVICE,
        "Tags": [config["slug"]],
        "Address": host.strip("[]"),
        "Port": int(port),
        "Meta": {
            "device_id": config["device_id"],
            "slug": config["slug"],
            "epoch": str(config["epoch"]),
            "version": config.get("version", ""),
            "agent_class": config.get("agent_class", ""),
            "spec_hash": config.get("spec_hash", ""),
            "instance": instance,
        },
        "Check": {
            "CheckID": f"{config['slug']}-healthz",
            "Name": "healthz",
            "HTTP": f"http://{listen}/healthz",
            "Interval": config.get("check_interval", "10s"),
            "Timeout": "2s",
            "FailuresBeforeCritical": 3,
            "DeregisterCriticalServiceAfter": "5m",
        },
    }


def read_token() -> str:
    """The token, read anew each time: a mounted file rotates."""
    path = os.environ.get("CONSUL_HTTP_TOKEN_FILE")
    if path:
        try:
            with open(path, encoding="ascii") as file:
                return file.read(4096).strip()
        except (OSError, ValueError):
            return ""
    return os.environ.get("CONSUL_HTTP_TOKEN", "")
