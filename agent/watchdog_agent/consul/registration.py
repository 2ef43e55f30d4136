"""Registration of this agent in the local Consul agent. It informs others; the agent runs without it."""

from __future__ import annotations

import os

from watchdog_agent import wire
from watchdog_agent.runtime import http, parsing, secrets, transport
from watchdog_agent.runtime.loop import between
from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Config, Document, Fetched, Log, Timer


class Registration:
    """Registers the agent, repeats it periodically (a no-op if unchanged; it repairs a Consul agent that lost the
    registration), and deregisters it. `log(text)` is called once per change."""

    TIMEOUT_S = 2.0
    CLOSE_S = 1.0
    MAX_WAIT_S = 30.0

    def __init__(  # called in one place
        self,
        loop: Loop,
        config: Config,
        instance: str,
        listen: str,
        log: Log,
        registered: Callable[[], None] = lambda: None,
    ) -> None:
        """`registered()` is called when Consul first accepts the registration."""
        self.loop = loop
        self.log = log
        self.registered = registered
        self.config = config
        self.url = place(config)
        self.done = False
        self.last = ""
        self.every_s = config.get("register_every_s", 45.0)
        self.path = f"{self.url.base}/v1/agent/service"
        self.slug = config["slug"]
        self.instance = instance
        self.body = json.dumps(registration(config, instance, listen)).encode()
        self.failures = 0
        self.closing: Callable[[], None] | None = None
        self.fetch: http.HttpRequest | None = None
        self.timer: Timer | None = None
        self.put_off = True

    def start(self) -> None:
        """Register now, then periodically."""
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
        self.fetch = transport.send(self.loop, self.url, data, timeout_s, answered, trusted)

    def _answered(
        self, status: int | None, _headers: dict[str, str], _body: bytes, reason: str
    ) -> None:
        if self.closing is not None:
            return
        text = reason if status is None else f"status {status}"
        if status == 200:
            first, self.done, self.failures, wait = not self.done, True, 0, self.every_s
            if first:
                self.registered()
            text = "registered"
        else:
            self.failures += 1
            wait = min(self.MAX_WAIT_S, 0.5 * 2 ** min(self.failures, 8))
        if text != self.last:
            self.last = text
            self.log(f"consul: {text}")
        self.timer = self.loop.later(wait * between(0.8, 1.2), self._again)

    def _again(self) -> None:
        self.timer = None
        if self.closing is None:
            self.start()

    def answered(self, status: int | None) -> None:
        """Handle the status of a report; None = no answer. An agent that gets a 409 is not accepted yet, and must not
        replace another instance's registration in Consul: it registers once it is accepted."""
        if status == 409:
            self.put_off = True
        elif self.put_off and status != 410 and self.closing is None:
            self.put_off = False
            if self.fetch is not None:
                self.fetch.cancel()
            if self.timer is not None:
                self.timer[2] = None
            self._again()

    def close(self, then: Callable[[], None]) -> None:
        """Deregister, then call back, after at most two CLOSE_S. This also applies without a confirmed registration:
        one that was in progress may have succeeded. A registration of another instance of this device under the same
        ID stays: Consul would not know that instance until it registers again."""
        self.closing = then
        if self.fetch is not None:
            self.fetch.cancel()
        self._call("GET", f"/{self.slug}", b"", self._found, self.CLOSE_S)

    def _found(
        self, status: int | None, _headers: dict[str, str], body: bytes, _reason: str
    ) -> None:
        then = self.closing
        assert then is not None
        if status == 200 and self._is_anothers(body):
            then()
        else:
            self._call("PUT", f"/deregister/{self.slug}", b"", lambda *_: then(), self.CLOSE_S)

    def _is_anothers(self, body: bytes) -> bool:
        try:
            return bool(parsing.loads(body)["Meta"]["instance"] != self.instance)
        except (ValueError, LookupError, TypeError):
            return False


def place(config: Config) -> http.Url:
    """URL of Consul; without a port, the scheme's default port, as in Consul's own CLI."""
    url = http.Url(config["consul"], tls=True)
    url.server_name = config.get("consul_tls", {}).get("server_name") or ""
    return url


def trusted_by(config: Config) -> ssl.SSLContext | None:
    """TLS context for the next call to Consul; None for http."""
    spec = config.get("consul_tls")
    return None if spec is None else spec["trust"].now()


def registration(config: Config, instance: str, listen: str) -> Document:
    """The service in Consul's format (https://developer.hashicorp.com/consul/api-docs/agent/service).

    The slug is both ID and tag, because Consul's DNS and its inexpensive lookups can find a tag."""
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
    """Read the token; again for each call, because mounted files rotate."""
    path = os.environ.get("CONSUL_HTTP_TOKEN_FILE")
    if path:
        return secrets.token(path)
    return os.environ.get("CONSUL_HTTP_TOKEN", "")
